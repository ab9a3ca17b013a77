"""What `structadmm run` shows: bars with times on a terminal, a line per stage in a log, and the final table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .pipeline import Watcher
from .report import bytes_text, seconds_text


class Bars(Watcher):
    """Progress on stderr: the whole run and the present stage, with accuracy, elapsed and remaining time."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._live = self.console.is_terminal
        self._progress: Progress | None = None
        self._all = self._stage = TaskID(0)
        self._name, self._last, self._since = "", "", time.perf_counter()

    def start(self, total_epochs: int, done: int) -> None:
        self._name, self._since = "", time.perf_counter()
        if not self._live:
            return
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[accuracy]:>9}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        self._all = self._progress.add_task("all epochs", total=total_epochs, completed=done, accuracy="")
        self._stage = self._progress.add_task("", total=None, accuracy="")
        self._progress.start()

    def stage(self, name: str, epochs: int, done: int) -> None:
        self._close_stage()
        self._name, self._last = name, ""
        if name == "finish":
            self.end()  # the bars' thread would disturb the timing
        elif self._progress:
            self._progress.reset(self._stage, description=name, total=epochs, completed=done, accuracy="")

    def epoch(self, row: Mapping[str, Any]) -> None:
        self._last = f"{row['val_accuracy']:.2%}"
        if self._progress:
            self._progress.update(self._all, advance=1, accuracy=self._last)
            self._progress.update(self._stage, advance=1, accuracy=self._last)

    def note(self, text: str) -> None:
        self.console.print(f"  {text}", highlight=False)

    def end(self) -> None:
        if self._progress:
            self._progress.remove_task(self._stage)
            self._progress.stop()
            self._progress = None

    def _close_stage(self) -> None:
        if self._name and self._last:
            spent = seconds_text(time.perf_counter() - self._since)
            self.note(f"{self._name}: validation accuracy {self._last}, {spent} so far")


def result_table(result: Mapping[str, Any]) -> Table:
    """Dense against pruned, of one run or of the mean of several; `result` is what pipeline.run_recipe returned."""
    runs, summary = result["runs"], result["summary"]
    several = len(runs) > 1
    who = f"{runs[0]['recipe']}, " + (
        f"mean of seeds {', '.join(map(str, summary['seeds']))}" if several else f"seed {summary['seeds'][0]}"
    )
    table = Table(title=who, box=SIMPLE, title_justify="left")
    for name in ("", "dense", "pruned", "gain", *(["least to most"] if several else [])):
        table.add_column(name, justify="right" if name else "left")

    def mean(which: str, key: str) -> float:
        return float(sum(r[which][key] for r in runs) / len(runs))

    def spread(key: str, form: str, scale: float = 1.0) -> list[str]:
        low, high = sorted(summary[key][end] * scale + 0.0 for end in ("min", "max"))  # + 0.0: no "-0.00"
        return [f"{low:{form}} to {high:{form}}"] if several else []

    lost = summary["accuracy_lost"]["mean"] * 100
    table.add_row(
        "test accuracy",
        f"{mean('dense', 'test_accuracy'):.2%}",
        f"{mean('pruned', 'test_accuracy'):.2%}",
        f"{-lost:+.2f} points",
        *spread("accuracy_lost", "+.2f", -100.0),
    )
    for label, key, form in (("conv weights", "conv_weights", ",.0f"), ("multiply-adds", "multiply_adds", ",.0f")):
        ratio = summary[f"{key}_ratio"]["mean"]
        table.add_row(
            label,
            f"{mean('dense', key):{form}}",
            f"{mean('pruned', key):{form}}",
            f"{ratio:.1f}x fewer",
            *spread(f"{key}_ratio", ".1f"),
        )
    table.add_row(
        "file size",
        bytes_text(mean("dense", "file_bytes")),
        bytes_text(mean("pruned", "file_bytes")),
        f"{summary['file_ratio']['mean']:.1f}x smaller",
        *spread("file_ratio", ".1f"),
    )
    for b in runs[0]["speed_up"]:
        times = [
            seconds_text(sum(r[which]["latency_seconds"][b]["median"] for r in runs) / len(runs))
            for which in ("dense", "pruned")
        ]
        key = f"speed_up_batch_{b}"
        table.add_row(f"latency, batch {b}", *times, f"{summary[key]['mean']:.2f}x as fast", *spread(key, ".2f"))
    return table
