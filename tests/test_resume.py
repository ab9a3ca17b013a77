"""A run that is killed by SIGKILL at random moments, and resumed, ends bit for bit where an unbroken one does."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def same(a, b, where="state"):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        assert torch.equal(*raw), where
    else:
        assert a == b, where


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_run_ends_where_an_unbroken_one_does(tmp_path):
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    done = subprocess.run(
        [sys.executable, str(HERE / "resume_training.py"), str(tmp_path), str(seed)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"seed {seed}\n{done.stdout}{done.stderr}"
    kills, states = map(int, re.findall(r"\d+", done.stdout))
    print(f"killed {kills} times, at {states} different points")
    assert kills >= 3 and states >= 2, f"seed {seed}: too few kills to show anything"
    whole, killed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole["step"] == 48 and whole["admm"]["iteration"] == 6 and whole["admm"]["schedule"]["rho"] != 1e-2
    same(whole, killed)
