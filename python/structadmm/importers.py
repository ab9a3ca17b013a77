"""Masks and masked checkpoints made by other tools: zeros in the weights, which is all that compact asks for.

Read are: dictionaries of masks by layer or parameter name (SparseML), NNI's nested ones, state dicts of
torch.nn.utils.prune (`weight_orig` with `weight_mask`), checkpoints that simply contain zeros, and the pruning history
of Torch-Pruning, which lists cuts in numbers that shift with every cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .analysis import Analysis
from .errors import PlanError
from .masks import Masks
from .paths import homes
from .trace import trace
from .tracking import Ints, filters

_PREFIXES = ("module.", "_orig_mod.", "model.")
_TRAFFIC = ("_input_", "_output_")


def _flat(source: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameter name -> mask. Layers without a parameter's name mean their weight; NNI nests them."""
    out: dict[str, Tensor] = {}
    for name, value in source.items():
        if isinstance(value, Mapping):
            masks = {}
            for inner, t in value.items():
                if not isinstance(t, Tensor) and t is not None:
                    raise PlanError(
                        f"import_masks_: {name}.{inner} got {type(t).__name__}, wanted a tensor of zeros and ones"
                    )
                if t is not None:
                    masks[inner.removesuffix("_mask")] = t
            # NNI can mask what goes in and out of a layer too; such a mask that lets everything pass says nothing.
            passing = {i for i, t in masks.items() if i.startswith(_TRAFFIC) and bool((t == 1).all())}
            out.update({f"{name}.{inner}": t for inner, t in masks.items() if inner not in passing})
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
    if not isinstance(source, Mapping):
        raise PlanError(f"import_masks_: source got {type(source).__name__}, wanted masks by name")
    if any(name.endswith("_mask") for name in source):
        # Beside the masks of pruning hooks a state dict may have others, such as those of attention.
        hooked = {name for name in source if f"{name.removesuffix('_mask')}_orig" in source}
        masks = [name for name in source if name.endswith("_mask") and (not hooked or name in hooked)]
        source = {name: source[name] for name in masks}
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
    or wrapped (`module.`, `_orig_mod.`, `model.`, also one in the other).
    Raises PlanError where names or shapes are not those of the model.
    """
    if not isinstance(state, Mapping):
        raise PlanError(f"load_masked_: state got {type(state).__name__}, wanted a state dict")
    plain: dict[str, Tensor] = {}
    for name, t in state.items():
        if name.endswith("_orig") and f"{name[:-5]}_mask" in state:
            plain[name[:-5]] = t * state[f"{name[:-5]}_mask"].to(t)
        elif not (name.endswith("_mask") and f"{name[:-5]}_orig" in state):
            plain[name] = t
    wanted = model.state_dict()
    while not set(plain) & set(wanted):
        prefix = next((p for p in _PREFIXES if plain and all(n.startswith(p) for n in plain)), None)
        if prefix is None:
            break
        plain = {n[len(prefix) :]: t for n, t in plain.items()}
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for tied in names.values():  # a checkpoint may have one of them only
        saved = next((n for n in tied if n in plain), None)
        plain |= {n: plain[saved] for n in tied if n not in plain} if saved is not None else {}
    missing = sorted(n for n in set(plain) ^ set(wanted) if not n.endswith("num_batches_tracked"))
    if missing:
        side = "no tensor of the model" if missing[0] in plain else "nothing in the checkpoint"
        raise PlanError(f"load_masked_: {missing[0]} got {side}, wanted the same names in both")
    for name, t in plain.items():
        if name in wanted and wanted[name].shape != t.shape:
            raise PlanError(f"load_masked_: {name} got shape {tuple(t.shape)}, wanted {tuple(wanted[name].shape)}")
    model.load_state_dict(plain, strict=False)
    return Masks.from_zeros(model)


@torch.no_grad()
def import_history_(
    model: nn.Module, history: Sequence[tuple[str, bool, Sequence[int]]], example: Tensor | Sequence[Tensor]
) -> Masks:
    """Set what Torch-Pruning cut out of a network to zero in the network that it was cut from, in place; the masks.

    model: the network before pruning, with weights before or after it. history: `DependencyGraph.pruning_history()`,
    entries (layer, whether output channels, numbers), each in the numbering that the cuts before it left. What hangs
    together with the channels named goes with them: filters, biases, normalisations, input channels of other layers.
    `compact` then gives the layers the shapes that Torch-Pruning gave them.

    Raises TraceError as `trace` does; PlanError for a layer that is not tracked, numbers outside the layer, and
    channels that zeros can't take out (those that a LayerNorm sees), before anything is changed.
    """
    who = "import_history_"
    analysis = Analysis(trace(model, example, who, share=True), create_bias=False, elide=False)
    sides, home = _sides(analysis), homes(model, analysis)
    locked = {int(label): why for ids, why in analysis.locks for label in np.unique(analysis.label[ids])}
    gone = np.zeros(analysis.n_ids, bool)  # by label
    for i, (name, out, numbers) in enumerate(history):
        labels = sides.get((name, bool(out)))
        if labels is None:
            raise PlanError(f"{who}: history[{i}] got {name!r}, wanted a layer of the model whose channels are tracked")
        left = labels[~gone[labels]]
        at = np.asarray(numbers, np.int64)
        outside = at[(at < 0) | (at >= left.size)]
        if outside.size:
            raise PlanError(f"{who}: history[{i}] ({name}) got channel {outside[0]}, wanted one of {left.size}")
        for label in left[at].tolist():
            if label in locked:
                raise PlanError(f"{who}: history[{i}] ({name}) got channels that zeros can't remove: {locked[label]}")
        gone[left[at]] = True
    weights: dict[str, Tensor] = {}
    for node, layer in analysis.layers.items():
        m: Any = analysis.module.get_submodule(str(node.target))  # with the model's memory
        weight = filters(m, layer.groups)  # [groups, O/groups, Cg, *K], a view
        rows, columns = (
            torch.from_numpy(gone[analysis.label[f.ids]]).to(weight.device) for f in (layer.outs, layer.ins)
        )
        weight[rows.reshape(weight.shape[:2])] = 0
        weight.transpose(1, 2)[columns.reshape(layer.groups, -1)] = 0
        if m.bias is not None:
            m.bias[rows] = 0
        name = home[str(node.target)]
        if (rows.any() or columns.any()) and not isinstance(model.get_submodule(name), nn.Embedding):
            weights[name] = m.weight != 0
    for node in (*analysis.norms, *analysis.affine):
        idle = torch.from_numpy(gone[analysis.label[analysis.facts[node].ids]].reshape(-1))
        m = analysis.module.get_submodule(str(node.target))
        for p in (getattr(m, "weight", None), getattr(m, "bias", None)):
            if p is not None:
                p[idle.to(p.device)] = 0
    return Masks(model, weights)


def _sides(analysis: Analysis) -> dict[tuple[str, bool], Ints]:
    """Labels of the channels of every layer: (name, whether those that it puts out)."""
    sides: dict[tuple[str, bool], Ints] = {}
    for node, layer in analysis.layers.items():
        for out, facts in ((True, layer.outs), (False, layer.ins)):
            sides[str(node.target), out] = analysis.label[facts.ids].reshape(-1)
    passing: list[fx.Node] = [*analysis.norms, *analysis.affine]
    for node in passing:
        labels = analysis.label[analysis.facts[node].ids].reshape(-1)
        sides[str(node.target), True] = sides[str(node.target), False] = labels
    return sides
