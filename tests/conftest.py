"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Small tensors wait longer for threads than they compute; on a busy machine twenty times as long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with mnist/, cifar10/, weights/: STRUCTADMM_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("STRUCTADMM_DATA") or ROOT.parent / "shared/data")
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}: set STRUCTADMM_DATA")
    return folder
