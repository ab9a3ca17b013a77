"""The HTML report: complete, self-contained, escaped, and with or without figures."""

import builtins
import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from structadmm import pipeline, progress, report

VOID = {"meta", "link", "br", "img", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that elements close in order, and collects ids, references and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "data", "srcset"):
                self.sources.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _row(accuracy: float, weights: int, macs: int, size: int, ms: float) -> dict[str, Any]:
    spread = {"median": ms * 1e-3, "q1": ms * 0.9e-3, "q3": ms * 1.1e-3, "min": ms * 0.8e-3, "rounds": 5, "calls": 9}
    return {
        "test_accuracy": accuracy,
        "val_accuracy": accuracy - 0.01,
        "conv_weights": weights,
        "multiply_adds": macs,
        "file_bytes": size,
        "latency_seconds": {"1": spread, "64": {**spread, "median": ms * 2e-3}},
    }


@pytest.fixture()
def result() -> dict[str, Any]:
    """What a run returns, made up, with names that would break a careless page."""
    stages = [("train", 3), ("admm-1", 4), ("retrain-1", 2), ("admm-2", 4), ("retrain-2", 5)]
    history = [
        {"stage": name, "epoch": i + 1, "loss": 0.5, "val_accuracy": 0.9 + 0.01 * i, "val_loss": 0.3}
        for name, n in stages
        for i in range(n)
    ]
    iterations = [
        {
            "round": which,
            "iteration": i + 1,
            "rho": 0.1,
            "primal": 1.0 / (i + 1),
            "dual": 0.0 if i == 0 else 0.5 / i,
            "eps_primal": 1e-3,
            "eps_dual": 1e-3,
            "relative": {"block<1>.conv": 0.5 / (i + 1), "done & over": 0.0},
        }
        for which in (1, 2)
        for i in range(4)
    ]
    layer = {"name": "block<1>.conv", "shape": [8, 4, 3, 3], "conv": True, "filters": 8, "columns": 36, "weights": 288}
    return {
        "recipe": "net <b>&",
        "seed": 0,
        "dataset": "digits & <i>more",
        "dense": _row(0.9876, 97680, 2258720, 410144, 1.5),
        "pruned": _row(0.9851, 4606, 164594, 43200, 0.5),
        "accuracy_lost": 0.0025,
        "conv_weights_ratio": 97680 / 4606,
        "multiply_adds_ratio": 2258720 / 164594,
        "file_ratio": 9.5,
        "speed_up": {"1": {"median": 3.0, "q1": 2.9, "q3": 3.1}, "64": {"median": 0.8, "q1": 0.7, "q3": 0.9}},
        "compact_difference": 1e-6,
        "reload_difference": 0.0,
        "steps": [{"step": "dense", "val_accuracy": 0.98, "conv_weights": 97680}],
        "layers": [
            {**layer, "filters_kept": 4, "columns_kept": 9, "weights_kept": 36},
            {**layer, "name": "gone", "filters_kept": 0, "columns_kept": 0, "weights_kept": 0},
        ],
        "compact": "a table < of > text",
        "plan": "another & table",
        "history": history,
        "iterations": iterations,
        "stages": [{"name": name, "epochs": n} for name, n in stages],
        "seconds": 83.0,
        "environment": {"cpu": "A <CPU>", "threads": 1, "torch": "2.13.0"},
        "settings": {"name": "x", "admm": {"rho": {"schedule": "ramp"}}, "plan": {"rule": []}},
    }


def test_the_page_is_whole_and_needs_nothing_else(result: dict[str, Any]) -> None:
    text = report.render([result])
    page = Page(text)
    assert "://" not in text and "@import" not in text
    assert all(s.startswith("#") for s in page.sources), "a reference that leaves the page"
    assert len(page.ids) == len(set(page.ids)), "ids are of the page, so figures may not share them"
    targets = {s.removeprefix("#") for s in page.sources + page.references}
    assert targets and targets <= set(page.ids)
    assert text.count("<svg") == 3 and "<script" not in text
    assert "currentColor" in text and report._INK not in text, "figures take the page's colour, light or dark"
    assert "prefers-color-scheme: dark" in text


def test_the_page_says_what_was_measured(result: dict[str, Any]) -> None:
    words = " ".join("".join(Page(report.render([result])).text).split())
    for part in (
        "98.76%",
        "98.51%",
        "21.2\u00d7 fewer",
        "13.7\u00d7 fewer",
        "\u22120.25 points",
        "500 \u00b5s",
        "1.4 minutes",
    ):
        assert part in words, part
    # A loss of speed is said as plainly as a gain, and is not shown as one.
    assert "0.80\u00d7 as fast" in words
    assert "<td class=gain>0.80" not in report.render([result])
    # Names are data, not markup.
    for part in ("net <b>&", "digits & <i>more", "A <CPU>", "block<1>.conv", "a table < of > text"):
        assert part in words, part


def test_several_seeds_have_a_row_each_and_a_mean(result: dict[str, Any]) -> None:
    other = copy.deepcopy(result)
    other["seed"] = 7
    other["pruned"]["test_accuracy"], other["accuracy_lost"] = 0.9901, -0.0025
    words = " ".join("".join(Page(report.render([result, other])).text).split())
    assert "Seeds 0, 7" in words and "Seed by seed" in words and "(seed 0)" in words
    assert "no test accuracy lost" in words and "98.76%" in words  # mean of 98.51 and 99.01


def test_without_matplotlib_the_tables_remain(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    there = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return there(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    text = report.render([result])
    Page(text)
    assert "<svg" not in text and "Figures need matplotlib" in text and "98.51%" in text


def test_a_run_without_admm_iterations_still_has_a_page(result: dict[str, Any]) -> None:
    result["iterations"], result["history"] = [], []
    text = report.render([result])
    Page(text)
    assert text.count("<svg") == 2


def test_it_is_written_whole(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report.write_report([result], path)
    good = path.read_text(encoding="utf-8")
    assert good == report.render([result])
    del result["dense"]
    with pytest.raises(KeyError):
        report.write_report([result], path)
    assert path.read_text(encoding="utf-8") == good and list(tmp_path.iterdir()) == [path]


def test_the_terminal_table(result: dict[str, Any]) -> None:
    other = copy.deepcopy(result)
    other["seed"] = 1
    other["conv_weights_ratio"], other["accuracy_lost"] = 25.0, -0.0005
    console = Console(width=140, color_system=None)
    with console.capture() as out:
        runs = [result, other]
        console.print(progress.result_table({"runs": runs, "summary": pipeline.summarise(runs)}))
    text = out.get()
    for part in (
        "mean of seeds 0, 1",
        "98.76%",
        "-0.10 points",
        "-0.25 to +0.05",
        "21.2 to 25.0",
        "latency, batch 64",
        "0.80x as fast",
    ):
        assert part in text, part


def test_units() -> None:
    assert [report.seconds_text(s) for s in (2.5e-5, 3.2e-3, 12.0)] == ["25 \u00b5s", "3.20 ms", "12.0 s"]
    assert [report.bytes_text(n) for n in (43_210, 1.5e6)] == ["43.2 kB", "1.50 MB"]
