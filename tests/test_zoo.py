"""A few networks of torchvision and timm; bench/zoo.py does all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))


@pytest.mark.parametrize("name", ["torchvision/shufflenet_v2_x0_5", "torchvision/vit_b_32", "timm/convnext_atto"])
def test_networks_that_people_use(name: str) -> None:
    from zoo import judge, torchvision

    try:
        torchvision()
        import timm  # noqa: F401
    except ImportError:
        pytest.skip("needs torchvision and timm")
    row = judge(name, 0.3)
    assert row["ok"], row
    assert row["parameters_after"] < 0.7 * row["parameters"]
