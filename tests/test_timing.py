"""The interleaved timer: order, pairing and statistics, on a clock that the test turns."""

import gc

import pytest

from structadmm import timing


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    return now


def test_turns_change_and_calls_fill_the_minimum(clock):
    log = []

    def call(name, seconds):
        def run():
            assert not gc.isenabled()
            log.append(name)
            clock[0] += seconds

        return run

    result = timing.interleave({"a": call("a", 0.25), "b": call("b", 1.0)}, warmup=0.5, repeats=3, min_time=0.5)
    assert gc.isenabled()
    assert result.calls == {"a": 2, "b": 1}
    # Two warm-up calls each, then rounds that start with a, with b, with a.
    assert "".join(log) == "aabb" + "aab" + "baa" + "aab"
    assert result["a"] == timing.Spread(0.25, 0.25, 0.25) and result.fastest() == "a" and result.fastest("b") == "b"
    assert result.ratio("b", "a").median == 4.0
    assert result.to_dict()["b"] == {"median": 1.0, "q1": 1.0, "q3": 1.0, "min": 1.0, "rounds": 3, "calls": 1}


def test_a_slower_machine_does_not_change_the_ratio(clock):
    pace = iter([1.0] * 4 + [1.0, 1.0, 8.0, 8.0, 2.0, 2.0])  # the machine's pace, call by call

    def call(seconds):
        def run():
            clock[0] += seconds * next(pace)

        return run

    result = timing.interleave({"a": call(0.5), "b": call(0.25)}, warmup=0.0, repeats=3, min_time=0.0)
    assert result.ratio("a", "b") == timing.Spread(2.0, 2.0, 2.0)
    assert result["a"].q3 > 2 * result["a"].q1


def test_settling_sleeps_and_calls_once_before_each_turn(clock, monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "sleep", lambda seconds: seen.append(seconds))
    calls = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    timing.interleave(calls, warmup=0.0, repeats=1, min_time=0.0, settle=0.5)
    assert seen[4:] == [0.5, "a", "a", 0.5, "b", "b"]  # two calls of each warm up


def test_spread_and_bad_arguments():
    assert timing.Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == timing.Spread(3.0, 2.0, 4.0)
    assert timing.Spread.of([2.0]).to_dict() == {"median": 2.0, "q1": 2.0, "q3": 2.0}
    for bad in ({}, {"repeats": 0}):
        with pytest.raises(ValueError, match="interleave: got"):
            timing.interleave({} if not bad else {"a": lambda: None}, **bad)


def test_a_limit_ends_the_rounds_early_but_for_three():
    calls = []
    timings = timing.interleave({"a": lambda: calls.append(1)}, warmup=0, repeats=50, min_time=0, limit=0.0)
    assert len(timings.rounds["a"]) == 3
    assert len(timing.interleave({"a": lambda: None}, warmup=0, repeats=5, min_time=0, limit=60.0).rounds["a"]) == 5
