"""Masks and checkpoints of other tools become zeros, and compact like our own."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import structadmm as sa
from structadmm.errors import PlanError
from structadmm.importers import import_history_, import_masks_, load_masked_
from structadmm.models import LeNet5
from test_operators import filled


def net() -> nn.Sequential:
    return filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)))


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def two_filters_gone() -> torch.Tensor:
    mask = torch.ones(8, 3, 3, 3)
    mask[[2, 5]] = 0
    return mask


@pytest.mark.parametrize("style", ["layer", "parameter", "nni", "wrapped", "prune"])
def test_masks_of_every_style(style: str) -> None:
    model, mask = net(), two_filters_gone()
    bias = torch.ones(8)
    bias[[2, 5]] = 0
    source = {
        "layer": {"0": mask.bool(), "2": None},
        "parameter": {"0.weight": mask.int(), "0.bias": bias},
        "nni": {"0": {"weight": mask, "bias": bias}, "2": {"weight": torch.ones(4, 8, 3, 3)}},
        "wrapped": {"module.0.weight": mask},
        "prune": {"0.weight_orig": torch.zeros(8, 3, 3, 3), "0.weight_mask": mask, "0.bias": bias * 7},
    }[style]
    masks = import_masks_(model, source)
    assert torch.equal(masks["0"], mask.bool())
    assert not model[0].weight[[2, 5]].any() and model[0].weight[0].all()
    small = sa.compact(model, X, columns="never")
    assert small.get_submodule("0").out_channels == 6
    assert torch.allclose(small(X), model(X), atol=1e-12)


def test_what_does_not_fit_changes_nothing() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    for source, message in (
        ({"0": two_filters_gone(), "7": torch.ones(2)}, r"7 got a mask \(2,\), wanted the name and shape"),
        ({"0": two_filters_gone() * 0.5}, "values other than 0 and 1"),
        ({"0": two_filters_gone(), "2": 3}, "2 got int, wanted a tensor of zeros and ones"),
    ):
        with pytest.raises(PlanError, match=message):
            import_masks_(model, source)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_checkpoint_under_pruning_hooks() -> None:
    model = net()
    hooked = copy.deepcopy(model)
    prune.ln_structured(hooked[0], "weight", 0.25, 2, 0)
    masks = load_masked_(model, hooked.state_dict())
    assert int(masks["0"].flatten(1).any(1).sum()) == 6
    assert torch.equal(model(X), hooked(X))
    with pytest.raises(PlanError, match=r"9\.weight got no tensor of the model"):
        load_masked_(model, {**model.state_dict(), "9.weight": torch.ones(1)})
    with pytest.raises(PlanError, match=r"0\.bias got shape \(3,\), wanted \(8,\)"):
        load_masked_(model, {**model.state_dict(), "0.bias": torch.ones(3)})


def test_a_published_sparse_checkpoint(data_dir: Path) -> None:
    """LeNet-5 at 108x by Dynamic Network Surgery: unstructured, yet most of its filters and neurons are empty."""
    arrays = np.load(data_dir / "weights/dns_lenet/lenet5_sparse.npz")
    state = {n.replace("ip", "fc"): torch.from_numpy(arrays[n]) for n in arrays.files}
    model = LeNet5()
    masks = load_masked_(model, state)
    assert masks.report().kept == 3977
    small = sa.compact(model, torch.randn(2, 1, 28, 28), columns="never")
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    a, b = model(x), small(x)
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()  # float32; some hundred roundings
    assert small.conv2.out_channels < 50 and small.fc1.out_features < 200
    assert sum(p.numel() for p in small.parameters()) < 0.1 * sum(p.numel() for p in model.parameters())


class Residual(nn.Module):
    """Two blocks on one stream, normalised, with an activation that is not zero at zero, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.an, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1)
        self.depth, self.out, self.fc = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.n(self.stem(x)))[:, :, :6, :6]
        x = x + self.b(torch.sigmoid(self.an(self.a(x))))
        return self.fc(torch.relu(self.out(torch.sigmoid(self.depth(x)))).flatten(1))


def test_a_history_in_numbers_that_shift() -> None:
    """What goes with a channel goes, and numbers count what is left, in the network cut by hand."""
    model = filled(Residual())
    history = [
        ("stem", True, [1, 6]),
        ("a", True, [0]),
        ("stem", True, [1]),
        ("a", True, [0, 1]),
        ("fc", False, [*range(16)]),
    ]
    masks = import_history_(model, history, X)
    kept = {"stem": [0, 3, 4, 5, 7], "a": [3, 4, 5]}  # 1 and 6, then the second of what was left, 2; 0, then 1 and 2
    for name, channels in kept.items():
        assert model.get_submodule(name).weight.flatten(1).any(1).nonzero().flatten().tolist() == channels
    assert model.out.weight.flatten(1).any(1).nonzero().flatten().tolist() == [1, 2, 3]
    assert model.n.bias[[1, 2, 6]].eq(0).all() and model.depth.bias[[1, 2, 6]].eq(0).all()
    assert not masks["b"][[1, 2, 6]].any() and not masks["b"][:, :3].any()
    small = sa.compact(model, X, columns="never")
    shapes = {n: tuple(m.weight.shape[:2]) for n, m in small.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert shapes == {"stem": (5, 3), "a": (3, 5), "b": (5, 3), "depth": (5, 1), "out": (3, 5), "fc": (3, 48)}
    assert torch.allclose(small(X), model(X), atol=1e-12)


def test_a_history_that_does_not_fit() -> None:
    model = filled(Residual())
    before = copy.deepcopy(model.state_dict())
    for history, message in (
        ([("stem", True, [0]), ("stem", True, [7])], r"history\[1\] \(stem\) got channel 7, wanted one of 7"),
        ([("nothing", True, [0])], "history.0. got 'nothing', wanted a layer"),
        ([("fc", True, [0])], "can't remove: network output"),
    ):
        with pytest.raises(PlanError, match=message):
            import_history_(model, history, X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet", "plain"])
def test_the_history_of_torch_pruning(name: str) -> None:
    """The tool itself: what it cuts out is what becomes zero, layer by layer and value by value."""
    tp = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    plain = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.SiLU(), nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(128, 4)]
    model = (Residual() if name == "resnet" else nn.Sequential(*plain)).double().eval()
    original = copy.deepcopy(model)
    importance = tp.importance.MagnitudeImportance(p=2)
    last = model.fc if name == "resnet" else model[-1]
    pruner = tp.pruner.MetaPruner(
        model, X, importance=importance, pruning_ratio=0.5, iterative_steps=2, ignored_layers=[last]
    )
    pruner.step()
    pruner.step()
    import_history_(original, pruner.DG.pruning_history(), X)
    small = sa.compact(original, X, columns="never")
    for at, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            assert small.get_submodule(at).weight.shape == m.weight.shape, at
    assert torch.allclose(small(X), model(X), atol=1e-12)


def test_masks_of_traffic_that_let_all_pass() -> None:
    masks = {"0": {"weight": two_filters_gone(), "_output_0": torch.ones(8)}, "2": {"_input_0": torch.ones(8)}}
    assert set(import_masks_(net(), masks)) == {"0"}
    masks["2"]["_input_0"][3] = 0
    with pytest.raises(PlanError, match=r"2\._input_0 got a mask \(8,\)"):
        import_masks_(net(), masks)


def test_formats_that_differ_a_little() -> None:
    model = net()
    for inner in ("weight", "weight_mask"):
        assert set(import_masks_(net(), {"0": {inner: two_filters_gone(), "bias": None}})) == {"0"}
    with pytest.raises(PlanError, match=r"0\.weight got ndarray, wanted a tensor"):
        import_masks_(model, {"0": {"weight": two_filters_gone().numpy()}})
    with pytest.raises(PlanError, match="source got list"):
        import_masks_(model, [two_filters_gone()])
    # A buffer of attention that only sounds like a mask, beside those of pruning hooks.
    hooked = {"0.weight_orig": model[0].weight, "0.weight_mask": two_filters_gone(), "attn_mask": torch.ones(9)}
    assert set(import_masks_(model, hooked)) == {"0"}


def test_checkpoints_wrapped_twice_and_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight

    source = net()
    model = copy.deepcopy(source)
    with torch.no_grad():
        source[0].weight[0] = 0
    load_masked_(model, {f"_orig_mod.module.{n}": t for n, t in source.state_dict().items()})
    assert torch.equal(model[0].weight, source[0].weight)
    table = torch.eye(9, 4)
    tied = Tied()
    load_masked_(tied, {"table.weight": table})
    assert torch.equal(tied.head.weight, table)
    with pytest.raises(PlanError, match="state got list"):
        load_masked_(model, [1])
