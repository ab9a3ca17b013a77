"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with mnist/, cifar10/, weights/: STRUCTADMM_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("STRUCTADMM_DATA") or ROOT.parent / "shared/data")
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}: set STRUCTADMM_DATA")
    return folder
