"""Copies of networks: with weights of their own, with the original's, or with none."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Module = TypeVar("Module", bound=nn.Module)


def clone(model: nn.Module, share: bool = False) -> nn.Module:
    """A deep copy of `model`; torch.nn.utils' pruning masks, weight norms and parametrisations become plain weights.

    share: parameters have the model's memory, which takes no time, and only their values may be read before `own`;
    buffers, which a forward may write to, are always copied. Weights that pruning hooks recompute are non-leaf tensors,
    which torch refuses to copy: they are copied detached.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for p in model.parameters() if share else ():
        if type(p) is nn.Parameter:
            memo[id(p)] = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
    copied = deep_copy(model, memo)
    for module in copied.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            elif isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
        if parametrize.is_parametrized(module):
            _bake(module)
    return copied


def _bake(module: nn.Module) -> None:
    """Plain parameters in the place of parametrised ones.

    torch's remove_parametrizations takes the properties off the class, which a deep copy shares with the original.
    """
    lists: Any = module.parametrizations
    values = {name: getattr(module, name).detach().clone() for name in lists}
    learns = {name: [p.requires_grad for p in lists[name].parameters()] for name in lists}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        if learns[name]:
            module.register_parameter(name, nn.Parameter(value, requires_grad=any(learns[name])))
        else:
            module.register_buffer(name, value)


def own(module: nn.Module) -> None:
    """Give the parameters of a copy that shares them memory of its own."""
    for p in module.parameters():
        p.data = p.data.clone(memory_format=torch.preserve_format)


def hollow(module: Module) -> Module:
    """A deep copy on the meta device: all but the values."""
    memo: dict[int, Any] = {}
    for t in (*module.parameters(), *module.buffers()):
        like = torch.empty_like(t, device="meta")
        memo[id(t)] = nn.Parameter(like, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else like
    return deep_copy(module, memo)


def deep_copy(module: Module, memo: dict[int, Any]) -> Module:
    """copy.deepcopy, which takes most of its time for the dozen empty dictionaries and the flags that a module has."""
    plain = [m for m in module.modules() if _is_plain(type(m))]
    for m in plain:
        memo[id(m)] = type(m).__new__(type(m))
    for m in reversed(plain):  # children first
        memo[id(m)].__setstate__({name: _copied(value, memo) for name, value in m.__getstate__().items()})
    return copy.deepcopy(module, memo)


def _is_plain(cls: type[nn.Module]) -> bool:
    """Whether what copy.deepcopy copies of such a module is its dictionary."""
    ways = ("__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")
    return all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in ways)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (dict, OrderedDict) and not value:
        return memo.setdefault(id(value), type(value)())
    return copy.deepcopy(value, memo)
