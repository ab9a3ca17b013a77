"""Files are written whole or not at all."""

import os
import stat

import pytest
import torch

from structadmm.files import atomic_torch_save, atomic_write, atomic_write_text


def test_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write_text(path, "one")
    os.chmod(path, 0o640)
    atomic_write_text(path, "two: é")
    assert path.read_text("utf-8") == "two: é" and os.listdir(tmp_path) == ["a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    atomic_torch_save({"x": torch.arange(3)}, tmp_path / "b.pt")
    assert torch.equal(torch.load(tmp_path / "b.pt", weights_only=True)["x"], torch.arange(3))


def test_an_exception_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half-way"), atomic_write(path) as f:
        f.write(b"new")
        raise RuntimeError("half-way")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="wanted one that exists.*nowhere'$"):
        atomic_write_text(tmp_path / "nowhere" / "a.txt", "")
    with pytest.raises(IsADirectoryError, match=f"wanted the name of a file: '{tmp_path}'$"):
        atomic_write_text(tmp_path, "")
    assert not os.listdir(tmp_path)


def test_a_new_file_has_the_ordinary_mode(tmp_path):
    with open(tmp_path / "plain", "wb"):
        pass
    atomic_write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
