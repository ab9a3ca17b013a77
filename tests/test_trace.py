"""trace: a graph with shapes, on a copy, and errors that say where and what."""

from __future__ import annotations

import copy
import operator
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from networks import MoreInTraining, ResNet
from structadmm.copies import clone, deep_copy, own
from structadmm.errors import TraceError
from structadmm.trace import PROBE_BATCH, Shape, hooked, rebatch, trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(4 * 36, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, flip: bool = False) -> Tensor:
        x = self.conv(x)
        self.relu(x)
        if mask is not None:
            x = x * mask
        if flip:
            x = x.flip(1)
        x = F.dropout(x * scale, 0.25, self.training)
        return self.fc(x.view(x.size(0), -1))


def test_graph_says_what_happens() -> None:
    model = Net().train()
    traced = trace(model, torch.randn(1, 3, 8, 8))
    nodes = list(traced.module.graph.nodes)
    assert [n.target for n in nodes if n.op == "placeholder"] == ["x"]
    relu = next(n for n in nodes if n.target == "relu")
    assert next(n for n in nodes if n.target is operator.mul).args[0] is relu, "users of x see what relu_ left in it"
    dropout = traced.module.get_submodule(next(n.target for n in nodes if "dropout" in str(n.target)))
    assert isinstance(dropout, nn.Dropout) and dropout.p == 0.25 and dropout.training
    assert traced.batch == PROBE_BATCH and traced.shapes[relu] == (PROBE_BATCH, 4, 6, 6)
    assert traced.notes == []
    assert traced.module.conv is not model.conv and traced.module.training
    x = torch.randn(5, 3, 8, 8)
    model.eval()
    traced.module.eval()
    assert torch.equal(model(x), traced.module(x))


def test_second_input() -> None:
    traced = trace(Net(), (torch.randn(1, 3, 8, 8), torch.ones(1, 4, 6, 6)))
    assert [n.target for n in traced.module.graph.nodes if n.op == "placeholder"] == ["x", "mask"]


def test_training_flags_and_statistics_are_kept() -> None:
    model = ResNet("B").train()
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    traced = trace(model, torch.randn(2, 3, 12, 12))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in traced.module.state_dict().items())
    assert not traced.module.bn1.training and traced.module.conv1.training and not model.bn1.training


def test_forward_that_differs_in_training_is_noted() -> None:
    traced = trace(MoreInTraining(), torch.randn(2, 3))
    assert "training mode" in traced.notes[0]
    assert not any(n.target == "b" for n in traced.module.graph.nodes)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_error_names_module_and_line() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), Branch()))
    with pytest.raises(
        TraceError, match=r"trace: 1\.1 \(Branch\) got .*test_trace.py:\d+ `if x\.sum\(\) > 0:`.*wanted"
    ):
        trace(model, torch.randn(2, 3))


def test_overwritten_views_are_refused() -> None:
    class Through(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            x.view(-1).mul_(2)
            return x

    with pytest.raises(TraceError, match=r"mul_ got a view \(view\) to overwrite while output still uses"):
        trace(Through(), torch.randn(2, 3))


def test_error_names_the_layer_that_does_not_fit() -> None:
    with pytest.raises(TraceError, match=r"compact: fc got RuntimeError.*got shapes \(2, 3, 9, 9\)"):
        trace(Net(), torch.randn(2, 3, 9, 9), "compact")


def test_examples_that_are_none() -> None:
    model = Net()
    x = torch.randn(1, 3, 8, 8)
    for example, message in (
        (3, "example got int, wanted a tensor or a tuple of tensors"),
        ((x, 1), r"example got \(Tensor, int\)"),
        ((), r"example got \(\)"),
        (x.double(), r"example got torch.float64, wanted torch.float32 as conv.weight"),
        (x.to("meta"), "example got a tensor on meta, wanted cpu as conv.weight"),
        ((x,) * 5, r"example got 5 tensors, wanted one for each argument of forward\(x, mask, scale, flip\)"),
    ):
        with pytest.raises(TraceError, match=message):
            trace(model, example)  # type: ignore[arg-type]


def test_fixed_batch_is_noted() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.reshape(2, 12))

    traced = trace(Fixed(), torch.randn(2, 3, 4))
    assert traced.batch == 2 and "batch size only" in traced.notes[0]


def test_rebatch_repeats_or_draws() -> None:
    a, b = torch.arange(4.0).reshape(2, 2), torch.arange(2)
    x, y = rebatch((a, b), 5)
    assert torch.equal(x[2:4], a) and y.tolist() == [0, 1, 0, 1, 0]
    x, y = rebatch((a, b), 5, seed=1)
    assert x.shape == (5, 2) and not torch.equal(x[:2], a) and y.tolist() == [0, 1, 0, 1, 0]
    state = torch.get_rng_state()
    rebatch((a,), 3, seed=2)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"


def test_clone_bakes_masks_and_parametrisations() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch.nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    torch.nn.utils.parametrizations.weight_norm(model[1])
    x = torch.randn(3, 4)
    copied = clone(model)
    # weight_norm's g * v / ||v|| is the same arithmetic before and after
    assert torch.equal(copied(x), model(x))
    assert set(copied.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert hasattr(model[0], "weight_mask") and hooked(model) == []
    assert torch.equal(copied(x), model(x)), "the original still works"
    model[1].register_forward_pre_hook(lambda m, args: None)
    assert hooked(model) == ["1"]


class Counted(nn.BatchNorm2d):
    """Writes to a buffer while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


@pytest.mark.parametrize("via", ["fx", "shapes", "export"])
def test_a_copy_that_shares_leaves_the_model_alone(via: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Counted(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    tied = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
    tied[1].weight = tied[0].weight
    model.append(nn.Flatten(2)).append(nn.Linear(36, 5)).append(tied[0]).append(tied[1])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    traced = trace(model, torch.randn(2, 3, 10, 10), via=via, share=True).module
    again = traced.get_submodule("6").weight
    assert again is traced.get_submodule("7").weight and again is not tied[0].weight
    assert again.data_ptr() == tied[0].weight.data_ptr() and again.requires_grad
    own(traced)
    with torch.no_grad():
        for t in (*traced.parameters(), *traced.buffers()):
            t.add_(1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_copies_of_modules_are_those_of_deepcopy() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LSTM(4, 3), nn.MultiheadAttention(4, 2))
    model[0].seen = model[1].seen = {}  # state that two modules share
    model[0].register_forward_hook(lambda *a: None)
    a, b = copy.deepcopy(model), deep_copy(model, {})
    assert [type(m) for m in b.modules()] == [type(m) for m in a.modules()]
    for m, n in zip(a.modules(), b.modules(), strict=True):
        assert list(vars(m)) == list(vars(n)) and [*m._forward_hooks.values()] == [*n._forward_hooks.values()]
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in b.parameters()}
    assert b[0].seen is b[1].seen is not model[0].seen
    assert b[1]._flat_weights[0] is b[1].weight_ih_l0


def test_graph_modules_trace_again() -> None:
    model = fx.symbolic_trace(ResNet("A").eval())
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(trace(model, x).module(x), model(x))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_a_wrapper_is_named_with_the_way_inside(wrap):
    inside = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(TraceError, match="wanted the module inside it: .(_orig_mod|module)$"):
        trace(wrap(inside), torch.zeros(1, 1, 5, 5))


def test_packages_whose_names_begin_with_torch_are_the_users() -> None:
    source = "def forward(self, x):\n    if x.sum() > 0:\n        return x\n    return -x\n"
    file = f"{Path(torch.__file__).parent}like/net.py"
    scope: dict[str, Any] = {}
    exec(compile(source, file, "exec"), scope)
    model = type("Like", (nn.Module,), {"forward": scope["forward"]})()
    with pytest.raises(TraceError, match=f"{re.escape(file)}:2"):
        trace(model, torch.randn(2, 3))


def test_shapes_that_change_in_place_are_one_tensors() -> None:
    """Tensors of one shape may be one object where only shapes are followed."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.relu(), x.relu()
            a.unsqueeze_(1)
            assert a.dim() == 3 and b.dim() == 2
            c = b.sigmoid()
            c.requires_grad_(False)
            return a.reshape(x.shape[0] if x.shape[1] == 3 else 1, 3) + c

    x = torch.randn(2, 3)
    traced = trace(Net(), x, via="shapes")
    y = torch.randn(5, 3)
    assert torch.equal(traced.module(y), Net()(y))
    # The batch of the probe is 3 as well.
    assert any(isinstance(s, Shape) and s == (PROBE_BATCH, 1, 3) for s in traced.shapes.values())
