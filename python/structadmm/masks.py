"""Masks: which weights of a model stay zero, and how they are held there while an optimizer runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import PlanError

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def weight_of(model: nn.Module, name: str, who: str) -> nn.Parameter:
    """The weight Parameter of a layer. Raises PlanError naming the layer if there is none."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise PlanError(f"{who}: layer got {name!r}, wanted the name of a module of {type(model).__name__}") from None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise PlanError(f"{who}: layer {name!r} got {type(module).__name__}, wanted one whose weight is a Parameter")
    return weight


_INTS = {2: torch.int16, 4: torch.int32}


def _keep_bits(gone: Tensor, w: Tensor) -> Tensor:
    """Integers as wide as w's values: all ones where a value stays, all zeros where it goes."""
    return gone.to(_INTS.get(w.element_size(), torch.int64)).sub_(1)


def _clear_(t: Tensor, bits: Tensor) -> None:
    """Make +0.0 of the values that go. By bits, which is five times faster on a CPU than masked_fill_, and unlike a
    multiplication turns NaN into zero and gives no -0.0."""
    if t.element_size() == bits.element_size() and t.device == bits.device:
        t.detach().view(bits.dtype).bitwise_and_(bits)
    else:
        t.masked_fill_((bits == 0).to(t.device), 0.0)


@dataclass(frozen=True)
class MaskRow:
    """One layer's line of Masks.report: its weights, and how many of them are kept."""

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int


@dataclass(frozen=True)
class MaskReport:
    """Kept weights by layer and in all; prints as a table."""

    rows: tuple[MaskRow, ...]

    @property
    def weights(self) -> int:
        return sum(r.weights for r in self.rows)

    @property
    def kept(self) -> int:
        return sum(r.kept for r in self.rows)

    @property
    def compression(self) -> float:
        """Weights per kept weight: 20.0 means twenty times fewer."""
        return self.weights / self.kept if self.kept else float("inf")

    def __str__(self) -> str:
        width = max([5, *(len(r.name) for r in self.rows)])
        lines = [f"{'layer':<{width}}  {'weights':>12}  {'kept':>12}  {'removed':>8}"]
        for name, n, kept in [*((r.name, r.weights, r.kept) for r in self.rows), ("all", self.weights, self.kept)]:
            lines.append(f"{name:<{width}}  {n:>12,}  {kept:>12,}  {1 - kept / max(n, 1):>8.2%}")
        return "\n".join(lines)


class Hold:
    """The hooks that Masks.hold put on an optimizer. remove() takes them off; also a context manager."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for h in self._handles:
            h.remove()
        self._handles.clear()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Masks(Mapping[str, Tensor]):
    """Layer name -> bool mask of its weight's shape, True where a weight may live. Masks are copied, never aliased.

    The model is referred to, not copied, and its weights are looked up at each use. Raises PlanError for an unknown
    layer or a mask of the wrong shape or dtype.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.model = model
        self._masks: dict[str, Tensor] = {}
        for name, mask in masks.items():
            self._masks[name] = self._checked(name, mask, "Masks")

    def _checked(self, name: str, mask: Tensor, who: str) -> Tensor:
        w = weight_of(self.model, name, who)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != w.shape:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise PlanError(f"{who}: mask of layer {name!r} got {got}, wanted torch.bool {tuple(w.shape)}")
        return torch.empty_like(w, dtype=torch.bool, requires_grad=False).copy_(mask)

    @classmethod
    def from_zeros(cls, model: nn.Module) -> Masks:
        """The pattern of zeros of every convolution and linear weight, however it came about. -0.0 is a zero."""
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, _LAYERS) and isinstance(getattr(module, "weight", None), nn.Parameter):
                found[name] = module.weight.detach() != 0
        return cls(model, found)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def _pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        """(weight, what is removed) of each layer that has zeros, on the weight's device."""
        pairs = []
        for name, mask in self._masks.items():
            w = weight_of(self.model, name, "Masks")
            if mask.device != w.device:
                mask = self._masks[name] = mask.to(w.device)
            if not bool(mask.all()):
                pairs.append((w, ~mask))
        return pairs

    @torch.no_grad()
    def apply_(self) -> Masks:
        """Set every weight outside its mask to +0.0 (NaN and infinity too)."""
        for w, gone in self._pairs():
            w.masked_fill_(gone, 0.0)
        return self

    def hold(self, optimizer: Optimizer) -> Hold:
        """Keep the masked weights at exactly +0.0 through every step of this optimizer, whatever its rule.

        Hooks on the optimizer: before a step the gradients there are zeroed (so that rules which mix entries of a
        tensor see none), after it the weights and every state tensor of the weight's shape (momentum, Adam's moments),
        so that nothing accumulates. A step that a gradient scaler skips runs no hook, and changes nothing. With a
        closure (LBFGS) the weights are zeroed when the step ends. Takes effect at once, with the masks as they are now.
        The hooks are not part of optimizer.state_dict(): hold again after a resume. Raises PlanError if the optimizer
        has none of the masked weights.
        """
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        pairs = self._pairs()
        held = [(w, _keep_bits(gone, w)) for w, gone in pairs if id(w) in theirs]
        if pairs and not held:
            raise PlanError("Masks.hold: optimizer got none of the masked weights, wanted one that trains this model")

        @torch.no_grad()
        def before(*_: Any) -> None:
            for i, (w, bits) in enumerate(held):
                if bits.device != w.device:  # the model has moved
                    held[i] = w, bits.to(w.device)
                if w.grad is not None and not w.grad.is_sparse:
                    _clear_(w.grad, held[i][1])

        @torch.no_grad()
        def after(*_: Any) -> None:
            for w, bits in held:
                _clear_(w, bits)
                for value in optimizer.state.get(w, {}).values():
                    if isinstance(value, Tensor) and value.shape == w.shape:
                        _clear_(value, bits)

        self.apply_()
        after()
        return Hold([optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)])

    def report(self) -> MaskReport:
        """Weights and kept weights, by layer and in all."""
        return MaskReport(tuple(MaskRow(n, tuple(m.shape), m.numel(), int(m.sum())) for n, m in self._masks.items()))

    def state_dict(self) -> dict[str, Tensor]:
        """Layer name -> mask (copies)."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the masks of a state_dict instead of the present ones. All or nothing; PlanError names the layer."""
        self._masks = {name: self._checked(name, mask, "Masks.load_state_dict") for name, mask in state.items()}
