"""Training state carried over a compaction: optimizer state, averaged copies, gradients keep their surviving entries.

small = sa.compact(model, example)
optimizer = sa.carry_state(optimizer, model, small)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
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
    """The name that a part of an attention module had, or a bias that was moved out of its layer."""
    head, _, last = name.rpartition(".")
    path, _, part = head.rpartition(".")
    old = _PACKED.get(f"{part}.{last}")
    if old is None and last.endswith("_bias"):
        path, old = head, f"{last.removesuffix('_bias')}.bias"
    return None if old is None else f"{path}.{old}" if path else old


def _kept(small: nn.Module, who: str) -> dict[str, Kept]:
    meta = getattr(small, "meta", {}).get("structadmm", {}) if isinstance(getattr(small, "meta", {}), dict) else {}
    if "kept" not in meta:
        raise CompactError(f"{who}: small got {type(small).__name__}, wanted what compact returned")
    found: dict[str, Kept] = meta["kept"]
    return found


def _surviving(small: nn.Module, name: str, t: Tensor, kept: dict[str, Kept]) -> Tensor | None:
    """The entries of a tensor like the parameter `name` before compaction that the parameter now has."""
    if name in kept:
        t = kept[name].take(t)
    owner: Any = small.get_submodule(name.rpartition(".")[0])
    now: Tensor = getattr(owner, name.rpartition(".")[2])
    if name.endswith("weight") and hasattr(owner, "dense_weight"):  # compacted columns: by the place of each value
        numbers = torch.arange(1, now.numel() + 1, dtype=torch.float64, device=now.device)
        mine = owner.weight
        try:
            owner.weight = nn.Parameter(numbers.to(mine.dtype) if now.numel() < 2**24 else numbers, requires_grad=False)
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


def carry_tensors(tensors: Mapping[str, Tensor], small: nn.Module) -> dict[str, Tensor]:
    """Tensors by the names of a model's parameters and buffers, cut to what `small` has of them.

    For averaged copies (EMA), gradients and anything else that has one value a weight. Names that `small` does not
    have, and those of tensors that compact made, are left out. Raises CompactError where `small` is not from compact.
    """
    kept = _kept(small, "carry_tensors")
    out = {}
    for name, now in [*small.named_parameters(), *small.named_buffers()]:
        source = name if name in tensors else _former(name)
        if source is not None and source in tensors:
            t = tensors[source]
            if t.dim() == 0 or now.dim() == 0:
                out[name] = t.clone()
                continue
            found = _surviving(small, name, t, kept)
            if found is not None:
                out[name] = found
    return out


def carry_state(optimizer: Kind, model: nn.Module, small: nn.Module) -> Kind:
    """A new optimizer of the same class and settings for the parameters of `small`, compacted from `model`.

    Momentum, moments and all other state tensors of a parameter's shape keep the entries that survive; counters are
    copied. Parameters of `small` keep their parameter group; biases that compact made join that of their layer, without
    state. Gradients are carried over too. `optimizer`, `model` are left as they are. Raises CompactError where `small`
    is not from compact, or `optimizer` does not train `model`.
    """
    kept = _kept(small, "carry_state")
    before = dict(model.named_parameters(remove_duplicate=False))  # a tied one under each of its names
    group = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    where = {n: group[id(p)] for n, p in before.items() if id(p) in group}
    if not where:
        raise CompactError("carry_state: optimizer got none of the parameters of model, wanted one that trains it")
    groups: list[dict[str, Any]] = [{**g, "params": []} for g in optimizer.param_groups]
    pairs: list[tuple[str, nn.Parameter, nn.Parameter]] = []
    layers = {n.rpartition(".")[0]: i for n, i in where.items()}
    for name, p in small.named_parameters():
        source = name if name in before else _former(name)
        if source in where:
            groups[where[source]]["params"].append(p)
            pairs.append((name, before[source], p))
        elif source not in before:  # made by compact
            groups[layers.get(name.rpartition(".")[0], 0)]["params"].append(p)
    accepted = inspect.signature(type(optimizer).__init__).parameters
    settings = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    new = type(optimizer)([g for g in groups if g["params"]], **settings)
    for name, old, p in pairs:
        if old.grad is not None:
            p.grad = _surviving(small, name, old.grad, kept)
        if old not in optimizer.state:
            continue
        state: dict[str, Any] = {}
        for key, value in optimizer.state[old].items():
            if isinstance(value, Tensor) and value.shape == old.shape and value.dim():
                found = _surviving(small, name, value, kept)
                if found is not None:
                    state[key] = found
            else:
                state[key] = value.clone() if isinstance(value, Tensor) else value
        new.state[p] = state
    return new
