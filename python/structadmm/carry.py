"""Training state carried over a compaction: optimizer state, averaged copies, gradients keep their surviving entries.

small = sa.compact(model, example)
optimizer = sa.carry_state(optimizer, model, small)
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import CompactError
from .rewrite import Kept

Kind = TypeVar("Kind", bound=Optimizer)

# Parts of torch's attention that compact takes apart: names of the parts and of what they were.
_PACKED = {"in_proj.weight": "in_proj_weight", "in_proj.bias": "in_proj_bias"}
_PACKED |= {f"{x}_proj.weight": f"{x}_proj_weight" for x in "qkv"}


def _former(name: str) -> str | None:
    """The name that a part of an attention module had, a bias that was moved out of its layer, or what a layer beside a
    module has of it."""
    head, _, last = name.rpartition(".")
    path, _, part = head.rpartition(".")
    old = _PACKED.get(f"{part}.{last}")
    if old is None and last.endswith("_bias"):
        path, old = head, f"{last.removesuffix('_bias')}.bias"
    if old is None and (beside := re.fullmatch(r"(.+)_(other|linear)_*", part)):
        old = f"{beside[1]}.{last}"
    return None if old is None else f"{path}.{old}" if path else old


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, a tied one under each of its names, and buffers."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers()


def _meta(small: nn.Module, who: str) -> dict[str, Any]:
    meta = getattr(small, "meta", {}).get("structadmm", {}) if isinstance(getattr(small, "meta", {}), dict) else {}
    if "kept" not in meta:
        raise CompactError(f"{who}: small got {type(small).__name__}, wanted what compact returned")
    found: dict[str, Any] = meta
    return found


def _surviving(
    small: nn.Module, name: str, t: Tensor, kept: dict[str, Kept], plus: Tensor | None = None
) -> Tensor | None:
    """The entries of a tensor like the parameter `name` before compaction that the parameter now has; plus: to add."""
    if name in kept:
        t = kept[name].take(t)
    if plus is not None and plus.shape == t.shape:
        t = t + plus.to(t)
    owner: Any = small.get_submodule(name.rpartition(".")[0])
    now: Tensor = getattr(owner, name.rpartition(".")[2])
    if name.endswith("weight") and hasattr(owner, "dense_weight"):  # compacted columns: by the place of each value
        wide = torch.float32 if now.numel() < 2**24 else torch.float64  # half precision can't count so far
        numbers = torch.arange(1, now.numel() + 1, dtype=wide, device=now.device)
        mine = owner.weight
        try:
            owner.weight = nn.Parameter(numbers, requires_grad=False)
            places = owner.dense_weight().detach().reshape(-1).round().long()
        finally:
            owner.weight = mine
        if places.numel() != t.numel():
            return None
        out = torch.zeros(now.numel(), dtype=t.dtype, device=t.device)
        at = places > 0
        out[(places[at] - 1).to(t.device)] = t.reshape(-1)[at.to(t.device)]
        t = out.reshape(now.shape)
    return t.clone() if t.shape == now.shape else None


def carry_tensors(tensors: Mapping[str, Tensor], small: nn.Module, folded: bool = False) -> dict[str, Tensor]:
    """Tensors by the names of a model's parameters and buffers, cut to what `small` has of them.

    For gradients, averaged copies and anything else that has one value a weight. Names may be wrapped (`module.`, as
    AveragedModel and DistributedDataParallel have it). folded: for copies of the values themselves (EMA), to load into
    a copy of `small`: what compact added to biases, means and merged channels is added here too, and what it made is
    there. That is exact for copies that emit the same constants as the model where filters went; a copy that lags
    behind comes as near as it is. Names that `small` does not have, and without `folded` those of tensors that compact
    made, are left out.

    Raises CompactError where `small` is not from compact, or has none of the names, or where a tensor has not the shape
    that the model's had.
    """
    who = "carry_tensors"
    meta = _meta(small, who)
    kept, plus = meta["kept"], meta["folded"] if folded else {}
    tensors = _unwrapped(tensors, small)
    out = {}
    found_any = False
    for name, now in tensors_of(small):
        source = name if name in tensors else _former(name)
        if source is None or source not in tensors:
            if folded:
                out[name] = now.detach().clone()
            continue
        found_any = True
        t = tensors[source]
        if t.dim() == 0 or now.dim() == 0:
            out[name] = t.clone()
            continue
        out[name] = _cut(small, name, t, kept, who, plus.get(name))
    if tensors and not found_any:
        raise CompactError(f"{who}: tensors got {next(iter(tensors))!r}, wanted names of the model's tensors")
    return out


def _unwrapped(tensors: Mapping[str, Tensor], small: nn.Module) -> Mapping[str, Tensor]:
    """Names without what wrappers put before them."""
    known = {n for n, _ in tensors_of(small)}
    while not known & set(tensors):
        prefix = next((p for p in ("module.", "_orig_mod.") if any(n.startswith(p) for n in tensors)), None)
        if prefix is None:
            break
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items()}
    return tensors


def _cut(small: nn.Module, name: str, t: Tensor, kept: dict[str, Kept], who: str, plus: Tensor | None = None) -> Tensor:
    """As _surviving; an error says which tensor is not like the parameter was."""
    try:
        found = _surviving(small, name, t, kept, plus)
    except (IndexError, RuntimeError):
        found = None
    if found is None:
        raise CompactError(f"{who}: {name} got shape {tuple(t.shape)}, wanted that of the tensor before compaction")
    return found


def carry_state(optimizer: Kind, model: nn.Module, small: nn.Module) -> Kind:
    """A new optimizer of the same class and settings for the parameters of `small`, compacted from `model`.

    Momentum, moments and all other state tensors of a parameter's shape keep the entries that survive; counters are
    copied. Parameters of `small` keep their parameter group; biases that compact made join that of their layer, without
    state. Parameters that are not of `model` (another network under the same optimizer) stay in their group, with their
    state. Gradients are carried over too. `optimizer`, `model` are left as they are; hooks on the optimizer, such as
    those of Masks.hold, are not carried over.

    Raises CompactError where `small` is not from compact, or not from `model`; where `optimizer` does not train
    `model`; and where its state has other shapes than the parameters (LBFGS, Adafactor).
    """
    who = "carry_state"
    kept: dict[str, Kept] = _meta(small, who)["kept"]
    before = dict(model.named_parameters(remove_duplicate=False))  # a tied one under each of its names
    group = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    where = {n: group[id(p)] for n, p in before.items() if id(p) in group}
    if not where:
        raise CompactError(f"{who}: optimizer got none of the parameters of model, wanted one that trains it")
    mine = {id(p) for p in before.values()}
    named = any("param_names" in g for g in optimizer.param_groups)
    groups: list[dict[str, Any]] = []
    for g in optimizer.param_groups:
        names = g.get("param_names", [""] * len(g["params"]))
        others = [(n, p) for n, p in zip(names, g["params"], strict=True) if id(p) not in mine]
        groups.append({k: v for k, v in g.items() if k != "param_names"} | {"params": others})
    pairs: list[tuple[str, nn.Parameter, nn.Parameter]] = []
    layers = {n.rpartition(".")[0]: i for n, i in where.items()}
    for name, p in small.named_parameters():
        source = name if name in before else _former(name)
        if source in where:
            groups[where[source]]["params"].append((name, p))
            pairs.append((name, before[source], p))
        elif source not in before:  # made by compact
            groups[layers.get(name.rpartition(".")[0], 0)]["params"].append((name, p))
    if not pairs:
        raise CompactError(
            f"{who}: model got none of the trained parameters of small, wanted what it was compacted from"
        )
    for name, old, _ in pairs:
        _cut(small, name, old.detach(), kept, f"{who}: model")
    state: dict[Tensor, dict[str, Any]] = {}
    for g in groups:
        state |= {p: copy.deepcopy(optimizer.state[p]) for _, p in g["params"] if p in optimizer.state}
        if not named:
            g["params"] = [p for _, p in g["params"]]
    for name, old, p in pairs:
        if old in optimizer.state:
            state[p] = {key: _state_of(small, name, key, v, old, kept) for key, v in optimizer.state[old].items()}
    accepted = inspect.signature(type(optimizer).__init__).parameters
    settings = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    new = type(optimizer)(groups, **settings)
    new.state.update(state)
    for name, old, p in pairs:
        if old.grad is not None:
            p.grad = _surviving(small, name, old.grad, kept)
    return new


def _state_of(small: nn.Module, name: str, key: str, value: Any, old: nn.Parameter, kept: dict[str, Kept]) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.numel() > 1:
        if value.shape != old.shape:
            raise CompactError(
                f"carry_state: {key} of {name} got shape {tuple(value.shape)}, wanted the parameter's "
                f"{tuple(old.shape)}: this optimizer's state can't be carried over"
            )
        return _cut(small, name, value, kept, "carry_state")
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        raise CompactError(
            f"carry_state: {key} of {name} got a list of tensors, wanted one of the parameter's shape: this "
            "optimizer's state can't be carried over"
        )
    return value.clone() if isinstance(value, Tensor) else value
