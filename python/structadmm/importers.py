"""Masks and masked checkpoints made by other tools: zeros in the weights, which is all that compact asks for.

Read are: dictionaries of masks by layer or parameter name (torch-pruning scripts, SparseML), NNI's nested ones, state
dicts of torch.nn.utils.prune (`weight_orig` with `weight_mask`), and checkpoints that simply contain zeros.
Torch-Pruning's own history is of networks that it has cut already, in numbers that shift with every cut; what it saves
needs no masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PlanError
from .masks import Masks

_PREFIXES = ("module.", "_orig_mod.", "model.")


def _flat(source: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameter name -> mask. Layers without a parameter's name mean their weight; NNI nests them."""
    out: dict[str, Tensor] = {}
    for name, value in source.items():
        if isinstance(value, Mapping):
            out.update({f"{name}.{inner}": t for inner, t in value.items() if isinstance(t, Tensor)})
        elif isinstance(value, Tensor):
            out[name.removesuffix("_mask")] = value
        elif value is not None:
            raise PlanError(f"import_masks_: {name} got {type(value).__name__}, wanted a tensor of zeros and ones")
    return out


def _named(model: nn.Module, name: str, t: Tensor) -> str | None:
    """The model's name of a parameter that a mask is for."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for prefix in ("", *_PREFIXES):
        if name.startswith(prefix):
            for candidate in (name[len(prefix) :], f"{name[len(prefix) :]}.weight"):
                if candidate in parameters and parameters[candidate].shape == t.shape:
                    return candidate
    return None


@torch.no_grad()
def import_masks_(model: nn.Module, source: Mapping[str, Any]) -> Masks:
    """Set what another tool's masks remove to zero in `model`, in place; the masks of the weights, to hold in training.

    source: layer or parameter name -> mask of zeros and ones (bool or number), nested by parameter as NNI has it, or a
    state dict that has `*_mask` entries (others are ignored then). None stands for no mask. Raises PlanError for a mask
    that fits no parameter, or whose values are others, and before anything is changed.
    """
    if any(name.endswith("_mask") for name in source):
        source = {name: value for name, value in source.items() if name.endswith("_mask")}
    found: dict[str, Tensor] = {}
    for name, mask in _flat(source).items():
        target = _named(model, name, mask)
        if target is None:
            raise PlanError(
                f"import_masks_: {name} got a mask {tuple(mask.shape)}, wanted the name and shape of a parameter"
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise PlanError(f"import_masks_: {name} got values other than 0 and 1, wanted a mask")
        found[target] = mask != 0
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, keep in found.items():
        parameters[name].masked_fill_(~keep.to(parameters[name].device), 0.0)
    weights = {n.removesuffix(".weight"): m for n, m in found.items() if n.endswith(".weight")}
    return Masks(model, weights)


@torch.no_grad()
def load_masked_(model: nn.Module, state: Mapping[str, Tensor]) -> Masks:
    """Load a checkpoint of a masked model into a plain one, in place; the pattern of zeros of its layers.

    state: a state dict, also of a model under torch.nn.utils.prune (`weight_orig` times `weight_mask` is the weight)
    or wrapped (`module.`). Raises PlanError where names or shapes are not those of the model.
    """
    plain: dict[str, Tensor] = {}
    for name, t in state.items():
        if name.endswith("_orig") and f"{name[:-5]}_mask" in state:
            plain[name[:-5]] = t * state[f"{name[:-5]}_mask"].to(t)
        elif not (name.endswith("_mask") and f"{name[:-5]}_orig" in state):
            plain[name] = t
    wanted = model.state_dict()
    for prefix in _PREFIXES:
        if not set(plain) & set(wanted) and all(n.startswith(prefix) for n in plain):
            plain = {n[len(prefix) :]: t for n, t in plain.items()}
    missing = sorted(n for n in set(plain) ^ set(wanted) if not n.endswith("num_batches_tracked"))
    if missing:
        side = "no tensor of the model" if missing[0] in plain else "nothing in the checkpoint"
        raise PlanError(f"load_masked_: {missing[0]} got {side}, wanted the same names in both")
    for name, t in plain.items():
        if name in wanted and wanted[name].shape != t.shape:
            raise PlanError(f"load_masked_: {name} got shape {tuple(t.shape)}, wanted {tuple(wanted[name].shape)}")
    model.load_state_dict(plain, strict=False)
    return Masks.from_zeros(model)
