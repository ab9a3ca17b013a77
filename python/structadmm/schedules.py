"""How rho goes from one ADMM iteration to the next.

A schedule gives the first rho and, after every iteration, the next one. ADMM does the rest: when rho becomes c*rho the
scaled dual U becomes U/c, so that the unscaled dual y = rho*U does not jump (Boyd et al. 2011, section 3.4.1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from .errors import PlanError


def _positive(what: str, value: Any) -> float:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise PlanError(f"{what} got {value!r}, wanted a positive number")
    return float(value)


def _count(what: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise PlanError(f"{what} got {value!r}, wanted a whole number of at least 1")
    return value


class Schedule(ABC):
    """`rho` is the value of the coming iteration; `restart` says that the iteration just advanced to starts anew."""

    def __init__(self, rho: float) -> None:
        self.rho = rho
        self.iteration = 0
        self.restart = False

    def advance(self, primal: float, dual: float) -> float:
        """Go on to the next iteration, given the residual norms ||W - Z|| and ||rho (Z' - Z)||. Returns its rho."""
        self.iteration += 1
        self.rho = self._next(primal, dual)
        return self.rho

    @abstractmethod
    def _next(self, primal: float, dual: float) -> float: ...

    def state_dict(self) -> dict[str, Any]:
        """What changes while it runs, as plain values. The settings are the caller's, and stay with the caller."""
        return {"kind": type(self).__name__, "rho": self.rho, "iteration": self.iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict of a schedule of the same kind. Raises PlanError for another kind."""
        if state.get("kind") != type(self).__name__:
            raise PlanError(
                f"{type(self).__name__}.load_state_dict: kind got {state.get('kind')!r}, wanted {type(self).__name__!r}"
            )
        rho, iteration = (
            _positive(f"{type(self).__name__}.load_state_dict: rho", state.get("rho")),
            state.get("iteration"),
        )
        if not isinstance(iteration, int):
            raise PlanError(
                f"{type(self).__name__}.load_state_dict: iteration got {iteration!r}, wanted a whole number"
            )
        self.rho, self.iteration, self.restart = rho, iteration, False


class Constant(Schedule):
    """One rho throughout."""

    def __init__(self, rho: float = 1e-3) -> None:
        super().__init__(_positive("Constant: rho", rho))

    def _next(self, primal: float, dual: float) -> float:
        return self.rho


class MultiStage(Schedule):
    """One rho after the other, `iterations` ADMM iterations each; the last one stays.

    restart=True begins each stage with Z = Proj(W) and U = 0, as the authors' multi-rho training does (1e-4, 1e-3,
    1e-2, 1e-1); otherwise the dual goes on, rescaled.
    """

    def __init__(
        self, rhos: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1), iterations: int = 5, restart: bool = True
    ) -> None:
        if not rhos:
            raise PlanError("MultiStage: rhos got none, wanted at least one")
        self.rhos = [_positive("MultiStage: rhos", r) for r in rhos]
        self.iterations = _count("MultiStage: iterations", iterations)
        self._restarts = restart
        super().__init__(self.rhos[0])

    def _next(self, primal: float, dual: float) -> float:
        stage, within = divmod(self.iteration, self.iterations)
        self.restart = self._restarts and within == 0 and stage < len(self.rhos)
        return self.rhos[min(stage, len(self.rhos) - 1)]


class ResidualBalancing(Schedule):
    """rho *= tau when the primal residual exceeds mu times the dual one, rho /= tau in the opposite case.

    Boyd et al. (2011), equation 3.13. `low` and `high` bound rho.
    """

    def __init__(
        self, rho: float = 1e-3, mu: float = 10.0, tau: float = 2.0, low: float = 1e-8, high: float = 1e8
    ) -> None:
        if not (mu > 1 and tau > 1):
            raise PlanError(f"ResidualBalancing: mu, tau got {mu}, {tau}, wanted both above 1")
        if not 0 < low <= rho <= high < math.inf:
            raise PlanError(f"ResidualBalancing: rho got {rho}, wanted {low} <= rho <= {high}, all positive and finite")
        self.mu, self.tau, self.low, self.high = float(mu), float(tau), float(low), float(high)
        super().__init__(float(rho))

    def _next(self, primal: float, dual: float) -> float:
        if primal > self.mu * dual:
            return min(self.rho * self.tau, self.high)
        if dual > self.mu * primal:
            return max(self.rho / self.tau, self.low)
        return self.rho


class Ramp(Schedule):
    """From `start` to `end` over `iterations` ADMM iterations, then constant.

    kind: "linear"; "cosine" (slow at both ends); "geometric" (the same factor each time, such as 1.3).
    """

    def __init__(self, start: float = 1e-4, end: float = 1e-1, iterations: int = 20, kind: str = "geometric") -> None:
        if kind not in ("linear", "cosine", "geometric"):
            raise PlanError(f"Ramp: kind got {kind!r}, wanted one of linear, cosine, geometric")
        self.start, self.end = _positive("Ramp: start", start), _positive("Ramp: end", end)
        self.iterations, self.kind = _count("Ramp: iterations", iterations), kind
        super().__init__(self.start)

    def _next(self, primal: float, dual: float) -> float:
        if self.iteration >= self.iterations:
            return self.end
        t = self.iteration / self.iterations
        if self.kind == "geometric":
            return self.start * (self.end / self.start) ** t
        if self.kind == "cosine":
            t = (1 - math.cos(math.pi * t)) / 2
        return self.start + (self.end - self.start) * t
