"""Masked == compacted on random networks made of every operation; `STRUCTADMM_SEEDS=0:3000` runs these seeds, and
bench/random_graphs.py thousands with a record of what is done."""

from __future__ import annotations

import os

import pytest

from random_graphs import check

FIRST, LAST = map(int, os.environ.get("STRUCTADMM_SEEDS", "0:40").split(":"))


@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_random_networks(seed: int) -> None:
    before, after = check(seed)
    assert after <= before + 200  # a layer may get a bias that it did not have
