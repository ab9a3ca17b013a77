"""Blocks of filters that are merged for tile products: the same weight, in the cheapest of all cuts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from structadmm import _core

Blocks = list[tuple[int, list[int]]]  # filters and taps of each


def spec_of(blocks: Blocks, channels: int, groups: int, seed: int) -> dict[str, Any]:
    weight = np.random.default_rng(seed).normal(size=sum(n * len(taps) for n, taps in blocks))
    return {
        "in_channels": channels * groups,
        "out_channels": sum(n for n, _ in blocks),
        "groups": groups,
        "kernel": (3, 3),
        "weight": [float(np.float32(w)) for w in weight],
        "taps": [t for _, taps in blocks for t in taps],
        "block_filters": [n for n, _ in blocks],
        "block_taps": list(np.cumsum([0, *(len(taps) for _, taps in blocks)])),
    }


def dense(weight: list[float], taps: list[int], filters: list[int], ends: list[int], columns: int) -> Any:
    out, at, first = np.zeros((sum(filters), columns)), 0, 0
    for b, n in enumerate(filters):
        of = taps[ends[b] : ends[b + 1]]
        out[first : first + n, of] = np.reshape(weight[at : at + n * len(of)], (n, len(of)))
        at, first = at + n * len(of), first + n
    return out


def cost(taps: int, filters: int, panel: int, product: int, unit: int) -> int:
    return -(-taps // 32) * (panel + product * -(-filters // 16)) + unit * -(-filters // 32)


def cheapest(blocks: Blocks, groups: int, costs: dict[str, int]) -> int:
    """By trying every cut into runs that the rules allow."""
    per_group, best = sum(n for n, _ in blocks) // groups, None
    for cuts in itertools.product([False, True], repeat=len(blocks) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(blocks)]
        total = 0
        for a, b in itertools.pairwise(edges):
            run = blocks[a:b]
            filters, first = sum(n for n, _ in run), sum(n for n, _ in blocks[:a])
            allowed = filters <= 64 and all(taps for _, taps in run)
            if b - a > 1 and not (allowed and first // per_group == (first + filters - 1) // per_group):
                break
            total += cost(len({t for _, taps in run for t in taps}), filters, **costs)
        else:
            best = total if best is None else min(best, total)
    assert best is not None
    return best


@settings(max_examples=200, deadline=None)
@given(data=st.data(), groups=st.sampled_from([1, 1, 2]), width=st.sampled_from([4, 8, 16, 24, 40]),
       density=st.sampled_from([0.02, 0.1, 0.5]), seed=st.integers(0, 1000))  # fmt: skip
def test_the_same_weight_in_the_cheapest_cut(data: Any, groups: int, width: int, density: float, seed: int) -> None:
    channels, n = 40, data.draw(st.integers(1, 4)) * groups
    rng = np.random.default_rng(seed)
    blocks = [(width, np.flatnonzero(rng.random(channels * 9) < density * (rng.random() < 0.8)).tolist())
              for _ in range(n)]  # fmt: skip
    spec = spec_of(blocks, channels, groups, seed)
    costs = {"panel": data.draw(st.sampled_from([0, 60, 300])), "product": 32,
             "unit": data.draw(st.sampled_from([0, 120]))}  # fmt: skip
    weight, taps, filters, ends = _core.merge_blocks(spec, **costs)
    before = dense(spec["weight"], spec["taps"], spec["block_filters"], spec["block_taps"], channels * 9)
    np.testing.assert_array_equal(dense(weight, taps, filters, ends, channels * 9), before)
    for b in range(len(filters)):
        assert np.all(np.diff(taps[ends[b] : ends[b + 1]]) > 0)
    got = sum(cost(ends[b + 1] - ends[b], n, **costs) for b, n in enumerate(filters))
    assert got == cheapest(blocks, groups, costs)


def test_narrow_blocks_merge_and_wide_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    costs = {"panel": 60, "product": 35, "unit": 120}
    for width, merges in ((8, True), (64, False)):
        blocks = [(width, np.flatnonzero(rng.random(576) < 0.1).tolist()) for _ in range(64 // width * 2)]
        filters = _core.merge_blocks(spec_of(blocks, 64, 1, 0), **costs)[2]
        assert (len(filters) < len(blocks)) == merges


def test_a_weight_that_would_outgrow_the_cache_stays_in_its_blocks() -> None:
    rng = np.random.default_rng(0)
    blocks = [(8, np.flatnonzero(rng.random(4608) < 0.1).tolist()) for _ in range(64)]
    spec = spec_of(blocks, 512, 1, 0)
    assert _core.merge_blocks(spec, panel=60, product=35, unit=120)[2] == spec["block_filters"]
