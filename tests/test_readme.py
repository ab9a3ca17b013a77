"""The README's Python runs as printed, in an environment that holds the names that its text promises."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import structadmm as sa
from structadmm import decisions

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(decisions.VARIABLE, str(tmp_path / "decisions"))
    monkeypatch.setattr(sa, "optimize", partial(sa.optimize, budget=0.1))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    images = torch.randn(8, 3, 12, 12)
    names = {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters()),
        "loader": [(torch.randn(8, 3, 12, 12), torch.randint(10, (8,))) for _ in range(3)],
        "loss_fn": nn.CrossEntropyLoss(),
        "example": torch.randn(1, 3, 12, 12),
        "accuracy": lambda m: -float(m(images).detach().square().mean()),
    }
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    kept = int((model[2].weight != 0).sum())
    assert kept == model[2].weight.numel() // 4
    x = torch.randn(4, 3, 12, 12)
    model.eval()
    with torch.no_grad():  # f32 sums of at most 144 terms of size one in another order
        torch.testing.assert_close(sa.load(tmp_path / "net.safetensors")(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(names["fast"](x), model(x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(names["scores"], model(names["example"]), rtol=1e-4, atol=1e-5)
