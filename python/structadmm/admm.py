"""ADMM-regularised training over any module, in the user's own loop and with the user's own optimizer.

    minimise f(W) subject to W_i in S_i           S_i: at most k nonzero groups of a structure, or several at once

    W-step   some epochs of the user's optimizer on f + sum_i rho_i/2 ||W_i - Z_i + U_i||^2
    Z-step   Z <- Proj(W + U)
    U-step   U <- U + W - Z

in the scaled form of Boyd et al., "Distributed Optimization and Statistical Learning via ADMM" (2011), section 3.1.1,
as StructADMM applies it (Zhang et al., IEEE TNNLS 33(5), 2022). A training loop:

    admm = ADMM(model, plan, rho=1e-3)
    for epoch in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            admm.add_penalty_grad_()
            optimizer.step()
        report = admm.step()                       # once per ADMM iteration: every epoch, or every few
    masks = admm.harden_()
    masks.hold(optimizer)                          # and retrain
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .constraints import Coupled, coupled_masks, fits, holds, project_mask, project_update_
from .errors import PlanError
from .masks import Hold, MaskReport, Masks, weight_of
from .plan import LayerPlan, Plan, ResolvedPlan
from .schedules import Constant, Schedule

__all__ = ["ADMM", "Hold", "LayerStep", "MaskReport", "Masks", "StepReport"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerStep:
    """One layer's part of a step: rho_i, ||W - Z||, rho_i ||Z' - Z||, and ||W - Z|| / ||W||."""

    rho: float
    primal: float
    dual: float
    relative: float


@dataclass(frozen=True)
class StepReport:
    """What one ADMM iteration did. `rho` is the one it ran with; `next_rho` what the schedule chose for the next.

    primal = ||W - Z||, dual = ||rho (Z' - Z)|| over all layers; eps_primal and eps_dual are their tolerances, and
    converged says that both are met (Boyd et al. 2011, section 3.3.1). Layers with rho 0 are left out of the sums.
    """

    iteration: int
    rho: float
    next_rho: float
    primal: float
    dual: float
    eps_primal: float
    eps_dual: float
    converged: bool
    layers: Mapping[str, LayerStep]


@dataclass
class _Layer:
    plan: LayerPlan
    z: Tensor
    u: Tensor
    scale: float  # rho_i = scale * schedule.rho; 0 for a layer whose masks meet its constraints already
    mask: Tensor | None


class ADMM:
    """The state Z, U of every planned layer, and the updates of the loop above.

    rho: a number or a Schedule. A rule's own rho is that layer's first rho; it then follows the schedule in proportion.
    masks: weights that are zero already, from the former progressive round: Z stays zero there, and a layer that meets
    its constraints already is finished: its rho is 0. The weights themselves are held by masks.hold(optimizer).
    coupled: sets of layers whose filters are kept or removed together, as structure.coupled_layers finds them (names
    alone: filter by filter); either none of a set is planned, or all are, each with one constraint, on filters, of one
    rate. abs_tol, rel_tol: of the stopping rule.
    Z and U are f32 in the weight's memory layout, and follow it when the model moves to another device; the weights
    are f32, bf16 or f16. The start is Z = Proj(W), U = 0.

    Raises PlanError naming the layer: weights that are not finite, of another dtype, or that do not require grad.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | ResolvedPlan,
        rho: float | Schedule = 1e-3,
        masks: Mapping[str, Tensor] | None = None,
        abs_tol: float = 1e-6,
        rel_tol: float = 1e-3,
        coupled: Sequence[Sequence[str]] = (),
    ) -> None:
        if not isinstance(plan, (Plan, ResolvedPlan)):
            raise PlanError(f"ADMM: plan got {type(plan).__name__}, wanted a Plan or ResolvedPlan")
        self.model = model
        self.plan = plan.resolve(model) if isinstance(plan, Plan) else plan
        self.schedule = rho if isinstance(rho, Schedule) else Constant(rho)
        self.abs_tol, self.rel_tol = abs_tol, rel_tol
        self.iteration = 0
        self._masks = Masks(model, masks) if masks else None
        self._layers: dict[str, _Layer] = {}
        first = self.schedule.rho
        for lp in self.plan:
            w = self._weight(lp)
            if not w.requires_grad:
                raise PlanError(
                    f"ADMM: weight of layer {lp.name!r} got requires_grad=False, wanted a trained one, or a skip rule"
                )
            z = torch.zeros_like(w, dtype=torch.float32, requires_grad=False)
            mask = self._masks.get(lp.name) if self._masks else None
            done = mask is not None and holds(mask, lp.constraints, lp.conv_groups)
            scale = 0.0 if done else 1.0 if lp.rho is None else lp.rho / first
            self._layers[lp.name] = _Layer(lp, z, torch.zeros_like(z), scale, mask)
        self._units = self._couple(coupled)
        self._check_finite("ADMM")
        self._start_()

    def add_penalty_grad_(self, loss_scale: float = 1.0) -> None:
        """Add rho_i (W_i - Z_i + U_i), the penalty's gradient, to every layer's .grad, in one pass over all layers.

        Call it once before each optimizer.step(), after backward (and after GradScaler.unscale_, or with the scale in
        force as loss_scale). A weight whose .grad is None gets one: the penalty acts on it all the same.
        """
        grads, ws, zs, us, rhos = [], [], [], [], []
        for name, layer in self._layers.items():
            rho = layer.scale * self.schedule.rho
            if rho == 0:
                continue
            w = self._weight(layer.plan)
            self._follow(layer, w)
            if w.grad is None:
                w.grad = torch.zeros_like(w)
            g = w.grad
            if g.is_sparse or g.dtype != w.dtype:
                kind = "a sparse one" if g.is_sparse else str(g.dtype)
                raise PlanError(f"ADMM.add_penalty_grad_: grad of layer {name!r} got {kind}, wanted dense {w.dtype}")
            grads.append(g)
            ws.append(w.detach())
            zs.append(layer.z)
            us.append(layer.u)
            rhos.append(rho * loss_scale)
        ops.add_penalty_grad_(grads, ws, zs, us, rhos)

    def penalty(self) -> Tensor:
        """sum_i rho_i/2 ||W_i - Z_i + U_i||^2 as a differentiable f32 scalar: to look at, or to add to the loss instead
        of calling add_penalty_grad_."""
        total = None
        for layer in self._layers.values():
            w = self._weight(layer.plan)
            self._follow(layer, w)
            term = (layer.scale * self.schedule.rho / 2) * (w.float() - layer.z + layer.u).square().sum()
            total = term if total is None else total + term.to(total.device)
        assert total is not None
        return total

    @torch.no_grad()
    def step(self) -> StepReport:
        """One ADMM iteration: project, dual update, residuals, rho schedule.

        Raises PlanError naming the layer if a weight is not finite, before anything has changed.
        """
        self._check_finite("ADMM.step")
        sums = self._project_and_update_duals_()
        self.iteration += 1
        report = self._residuals(sums)
        return replace(report, next_rho=self._next_rho_(report))

    @torch.no_grad()
    def harden_(self) -> Masks:
        """Hard prune: every planned weight becomes its own projection, Proj(W). Returns the masks, those given to the
        constructor included. Raises PlanError naming the layer if a weight is not finite, before anything has changed.
        """
        self._check_finite("ADMM.harden_")
        found = dict(self._masks) if self._masks else {}
        for unit in self._units:
            for name in unit:
                self._follow(self._layers[name], self._weight(self._layers[name].plan))
            if len(unit) > 1 or unit in self._structured:
                found.update(zip(unit, self._coupled_masks(unit, with_u=False), strict=True))
                continue
            layer = self._layers[unit[0]]
            lp, w = layer.plan, self._weight(layer.plan)
            found[unit[0]] = project_mask(w.detach(), lp.constraints, lp.conv_groups, layer.mask)
        found = {name: found[name] for name in {**(self._masks or {}), **self._layers}}
        return Masks(self.model, found).apply_()

    def state_dict(self) -> dict[str, Any]:
        """Everything from which a run resumes bit for bit, as plain values and tensors (copies): Z, U, iteration,
        schedule, masks. The weights and the optimizer are the caller's to save."""
        return {
            "version": 1,
            "iteration": self.iteration,
            "schedule": self.schedule.state_dict(),
            "layers": {
                name: {
                    "z": layer.z.clone(),
                    "u": layer.u.clone(),
                    "scale": layer.scale,
                    "constraints": _signature(layer.plan),
                    "mask": None if layer.mask is None else layer.mask.clone(),
                }
                for name, layer in self._layers.items()
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict of the same plan. PlanError names what differs; then nothing has changed."""
        who = "ADMM.load_state_dict"
        if state.get("version") != 1:
            raise PlanError(f"{who}: version got {state.get('version')!r}, wanted 1")
        saved = state.get("layers", {})
        if not isinstance(saved, Mapping):
            raise PlanError(f"{who}: layers got {type(saved).__name__}, wanted those of a state_dict")
        if list(saved) != list(self._layers):
            odd = next(iter(set(saved) ^ set(self._layers)), "order")
            raise PlanError(f"{who}: layers got other ones ({odd!r}), wanted {', '.join(self._layers)}")
        for name, layer in self._layers.items():
            s = saved[name]
            missing = {"z", "u", "scale", "constraints", "mask"} - set(s)
            if missing:
                raise PlanError(f"{who}: layer {name!r} got no {min(missing)}, wanted what state_dict() gives")
            if s["constraints"] != _signature(layer.plan):
                raise PlanError(
                    f"{who}: layer {name!r} got constraints {s['constraints']}, wanted {_signature(layer.plan)}"
                )
            for key in ("z", "u", "mask"):
                got, wanted = _kind(s[key]), _kind(getattr(layer, key))
                if got != wanted:
                    raise PlanError(f"{who}: {key} of layer {name!r} got {got}, wanted {wanted}")
        iteration = state.get("iteration")
        if not isinstance(iteration, int):
            raise PlanError(f"{who}: iteration got {iteration!r}, wanted a whole number")
        self.schedule.load_state_dict(state.get("schedule", {}))
        self.iteration = iteration
        for name, layer in self._layers.items():
            s = saved[name]
            self._follow(layer, self._weight(layer.plan))
            layer.z.copy_(s["z"])
            layer.u.copy_(s["u"])
            layer.scale = float(s["scale"])
            if layer.mask is not None:
                layer.mask.copy_(s["mask"])

    def rho(self, name: str) -> float:
        """The present rho of a layer."""
        return self._layer(name).scale * self.schedule.rho

    def z(self, name: str) -> Tensor:
        """Z of a layer: f32, the live state, to be read only."""
        return self._layer(name).z

    def u(self, name: str) -> Tensor:
        """U of a layer: f32, the live state, to be read only."""
        return self._layer(name).u

    def _layer(self, name: str) -> _Layer:
        if name not in self._layers:
            raise PlanError(f"ADMM: layer got {name!r}, wanted one of {', '.join(self._layers)}")
        return self._layers[name]

    # The named updates, in the paper's order.

    def _start_(self) -> None:
        """Z = Proj(W), U = 0."""
        with torch.no_grad():
            for layer in self._layers.values():
                self._follow(layer, self._weight(layer.plan))
                layer.u.zero_()
            self._update_()
            for layer in self._layers.values():
                layer.u.zero_()

    def _project_and_update_duals_(self) -> dict[str, list[float]]:
        """Z' = Proj(W + U), U' = U + W - Z'. Returns each layer's five sums (see the op project_update_)."""
        for layer in self._layers.values():
            self._follow(layer, self._weight(layer.plan))
        sums = self._update_()
        return dict(zip(self._layers, _to_host([sums[name] for name in self._layers]), strict=True))

    def _update_(self) -> dict[str, Tensor]:
        """Project and update the duals of every layer, coupled ones together. Returns the sums of the op by layer."""
        sums: dict[str, Tensor] = {}
        for unit in self._units:
            layers = [self._layers[name] for name in unit]
            if len(unit) == 1 and unit not in self._structured:
                layer, lp = layers[0], layers[0].plan
                w = self._weight(lp).detach()
                sums[unit[0]] = project_update_(w, layer.z, layer.u, lp.constraints, lp.conv_groups, layer.mask)[1]
                continue
            for name, layer, on in zip(unit, layers, self._coupled_masks(unit, with_u=True), strict=True):
                sums[name] = ops.masked_update_(self._weight(layer.plan).detach(), layer.z, layer.u, on)
        return sums

    def _coupled_masks(self, unit: tuple[str, ...], with_u: bool) -> list[Tensor]:
        layers = [self._layers[name] for name in unit]
        ws = [self._weight(layer.plan).detach() for layer in layers]
        us = [layer.u for layer in layers] if with_u else None
        groups, masks = [layer.plan.conv_groups for layer in layers], [layer.mask for layer in layers]
        return coupled_masks(ws, us, layers[0].plan.constraints[0], groups, masks, self._structured.get(unit))

    def _couple(self, coupled: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
        """The planned layers in units that are projected together."""
        member: dict[str, tuple[str, ...]] = {}
        self._structured: dict[tuple[str, ...], Coupled] = {}
        for names in coupled:
            unit = tuple(name for name in names if name in self._layers)
            if unit and len(unit) < len(names):
                alone = next(name for name in names if name not in self._layers)
                raise PlanError(
                    f"ADMM: coupled layer {alone!r} got no constraint, wanted the one of {unit[0]!r}, whose filters "
                    f"can only go with its own, or both left alone"
                )
            structured = unit and isinstance(names, Coupled) and not names.plain
            for name in unit:
                wanted, got = (self._layers[n].plan.constraints for n in (unit[0], name))
                alike = [c.structure for c in got] == ["filter"] and (
                    got[0].keep == wanted[0].keep if not structured else math.isclose(got[0].rate, wanted[0].rate)
                )
                if name in member or not alike or len(wanted) != 1:
                    kept = " + ".join(f"{c.keep} {c.structure}s kept" for c in got)
                    raise PlanError(
                        f"ADMM: coupled layer {name!r} got {'in two sets' if name in member else kept}, wanted one "
                        f"constraint on filters, as {unit[0]!r} has"
                    )
                member[name] = unit
            if structured:
                assert isinstance(names, Coupled)
                self._structured[unit] = names
        return list(dict.fromkeys(member.get(name, (name,)) for name in self._layers))

    def _residuals(self, sums: Mapping[str, list[float]]) -> StepReport:
        layers, total, n = {}, [0.0] * 5, 0
        for name, (r2, s2, w2, z2, u2) in sums.items():
            layer, rho = self._layers[name], self.rho(name)
            relative = math.sqrt(r2 / w2) if w2 else 0.0
            layers[name] = LayerStep(rho, math.sqrt(r2), rho * math.sqrt(s2), relative)
            if rho:
                n += layer.plan.weights
                for i, x in enumerate((r2, rho**2 * s2, w2, z2, rho**2 * u2)):
                    total[i] += x
        primal, dual, w, z, y = map(math.sqrt, total)
        eps_primal = math.sqrt(n) * self.abs_tol + self.rel_tol * max(w, z)
        eps_dual = math.sqrt(n) * self.abs_tol + self.rel_tol * y
        rho = self.schedule.rho
        converged = primal <= eps_primal and dual <= eps_dual
        return StepReport(self.iteration, rho, rho, primal, dual, eps_primal, eps_dual, converged, layers)

    def _next_rho_(self, report: StepReport) -> float:
        """Ask the schedule; keep y = rho U continuous by U <- U/c when rho becomes c*rho, or start a stage anew."""
        new = self.schedule.advance(report.primal, report.dual)
        if self.schedule.restart:
            self._start_()
        elif new != report.rho:
            for layer in self._layers.values():
                layer.u.mul_(report.rho / new)
        return new

    # Where the weights are.

    def _weight(self, lp: LayerPlan) -> nn.Parameter:
        w = weight_of(self.model, lp.name, "ADMM")
        if tuple(w.shape) != lp.shape:
            raise PlanError(f"ADMM: weight of layer {lp.name!r} got shape {tuple(w.shape)}, wanted {lp.shape}")
        if w.dtype not in _DTYPES:
            raise PlanError(
                f"ADMM: weight of layer {lp.name!r} got {w.dtype}, wanted one of {', '.join(map(str, _DTYPES))}"
            )
        if w.device.type not in ("cpu", "cuda"):
            raise PlanError(f"ADMM: weight of layer {lp.name!r} got device {w.device}, wanted cpu or cuda")
        return w

    def _follow(self, layer: _Layer, w: Tensor) -> None:
        """Bring Z, U and the mask to the device and memory layout of a weight that has moved."""
        if layer.z.device != w.device or layer.z.stride() != w.stride():
            with torch.no_grad():
                for key in ("z", "u", "mask"):
                    old = getattr(layer, key)
                    if old is not None:
                        new = torch.empty_strided(w.shape, w.stride(), dtype=old.dtype, device=w.device)
                        setattr(layer, key, new.copy_(old))

    def _check_finite(self, who: str) -> None:
        found = []
        for layer in self._layers.values():
            w = self._weight(layer.plan)
            self._follow(layer, w)
            found.append(fits(w.detach(), layer.u))
        for name, good in zip(self._layers, _to_host(found), strict=True):
            if not good:
                raise PlanError(f"{who}: weight of layer {name!r} got NaN, infinite or huge values, wanted finite ones")


def _to_host(values: list[Tensor]) -> list[Any]:
    """One plain value per tensor, waiting for a device once and not once per layer."""
    rows: list[Any] = torch.stack([v.to(values[0].device) for v in values]).tolist()
    return rows


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _signature(lp: LayerPlan) -> list[list[Any]]:
    return [[c.structure, c.block, c.keep] for c in lp.constraints]
