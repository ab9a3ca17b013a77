"""Timing that compares: the callables take turns within one run, so a machine that slows down slows them all.

Standard library only. Times are seconds per call.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "q1": self.q1, "q3": self.q3}


@dataclass(frozen=True)
class Timings:
    """What `interleave` measured: per name the seconds per call of each round, and the calls that a round made."""

    rounds: dict[str, list[float]]
    calls: dict[str, int]

    def __getitem__(self, name: str) -> Spread:
        return Spread.of(self.rounds[name])

    def fastest(self, *names: str) -> str:
        """The name (of all, or of those given) with the least median."""
        return min(names or self.rounds, key=lambda name: self[name].median)

    def ratio(self, name: str, base: str) -> Spread:
        """Spread of time(name) / time(base), paired by round: how many times faster `base` is than `name`."""
        return Spread.of([a / b for a, b in zip(self.rounds[name], self.rounds[base], strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """Per name the spread in seconds, the fastest round, rounds and calls a round."""
        return {
            name: {**self[name].to_dict(), "min": min(t), "rounds": len(t), "calls": self.calls[name]}
            for name, t in self.rounds.items()
        }


def _time(call: Callable[[], object], calls: int, sync: Callable[[], object] | None) -> float:
    start = perf_counter()
    for _ in range(calls):
        call()
    if sync is not None:
        sync()
    return perf_counter() - start


def interleave(
    callables: Mapping[str, Callable[[], object]],
    warmup: float = 0.2,
    repeats: int = 15,
    min_time: float = 0.02,
    sync: Callable[[], object] | None = None,
    settle: float = 0.0,
    limit: float = math.inf,
) -> Timings:
    """Time the callables in turns.

    Each is first called for `warmup` seconds (at least twice), which also tells how many calls make up `min_time`
    seconds. Then come `repeats` rounds, in each of which every callable runs that many times, and whoever starts
    changes from round to round, because a callable pays for the caches that its predecessor left.
    `sync` waits for the device at the end of a measurement (torch.cuda.synchronize). `settle`: seconds to sleep before
    each turn, followed by a call that does not count: thread pools spin for milliseconds after their last work, and
    would take cores from the next callable's. `limit`: seconds after which no further round begins, but
    for the first three. The garbage collector rests.
    """
    if not callables or repeats < 1:
        raise ValueError(
            f"interleave: got {len(callables)} callables and {repeats} repeats, wanted at least one of each"
        )
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        calls = {}
        began = perf_counter()
        for name, call in callables.items():
            best, spent, n = math.inf, 0.0, 0
            while spent < warmup or n < 2:
                took = _time(call, 1, sync)
                best, spent, n = min(best, took), spent + took, n + 1
            calls[name] = max(1, math.ceil(min_time / max(best, 1e-9)))
        rounds: dict[str, list[float]] = {name: [] for name in callables}
        order = list(callables)
        for i in range(repeats):
            if i >= 3 and perf_counter() - began > limit:
                break
            first = i % len(order)
            for name in order[first:] + order[:first]:
                if settle:
                    sleep(settle)
                    callables[name]()
                rounds[name].append(_time(callables[name], calls[name], sync) / calls[name])
    finally:
        if enabled:
            gc.enable()
    return Timings(rounds, calls)
