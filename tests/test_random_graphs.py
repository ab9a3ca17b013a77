"""Masked == compacted on random networks made of every operation; `python tests/random_graphs.py` does thousands."""

from __future__ import annotations

import pytest

from random_graphs import check


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed: int) -> None:
    before, after = check(seed)
    assert after <= before + 200  # a layer may get a bias that it did not have
