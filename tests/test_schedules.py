"""Schedules of rho: their values by hand, their state, their errors."""

import math

import pytest

from structadmm.errors import PlanError
from structadmm.schedules import Constant, MultiStage, Ramp, ResidualBalancing


def run(schedule, n, primal=1.0, dual=1.0):
    return [schedule.rho, *(schedule.advance(primal, dual) for _ in range(n))]


def test_constant():
    assert run(Constant(0.5), 3) == [0.5] * 4


def test_multi_stage_restarts_at_each_new_stage_only():
    s = MultiStage([1e-4, 1e-3, 1e-2], iterations=2)
    seen = [(s.advance(1, 1), s.restart) for _ in range(8)]
    assert seen == [
        (1e-4, False),
        (1e-3, True),
        (1e-3, False),
        (1e-2, True),
        (1e-2, False),
        (1e-2, False),
        (1e-2, False),
        (1e-2, False),
    ]
    s = MultiStage([1e-4, 1e-3], iterations=1, restart=False)
    assert s.advance(1, 1) == 1e-3 and not s.restart


def test_residual_balancing():
    assert run(ResidualBalancing(1.0, mu=10, tau=2), 3, primal=11, dual=1) == [1, 2, 4, 8]
    assert run(ResidualBalancing(1.0, mu=10, tau=2), 3, primal=1, dual=11) == [1, 0.5, 0.25, 0.125]
    assert run(ResidualBalancing(1.0, mu=10, tau=2), 3, primal=10, dual=1) == [1] * 4  # equality changes nothing
    assert run(ResidualBalancing(1.0, high=3.0), 3, primal=1, dual=0) == [1, 2, 3, 3]
    assert run(ResidualBalancing(1.0, low=0.4), 3, primal=0, dual=1) == [1, 0.5, 0.4, 0.4]


def test_ramps_meet_their_ends_and_middles():
    for kind, middle in (("linear", 0.505), ("cosine", 0.505), ("geometric", 0.1)):
        rhos = run(Ramp(0.01, 1.0, 4, kind), 6)
        assert rhos[0] == 0.01 and rhos[4:] == [1.0, 1.0, 1.0]
        assert math.isclose(rhos[2], middle) and rhos == sorted(rhos)
    linear, cosine = (run(Ramp(0.01, 1.0, 4, kind), 1)[1] for kind in ("linear", "cosine"))
    assert cosine < linear  # slow at the start
    assert run(Ramp(1.0, 0.01, 2), 2) == [1.0, pytest.approx(0.1), 0.01]


@pytest.mark.parametrize("make", [Constant, MultiStage, ResidualBalancing, Ramp])
def test_state_goes_on_where_it_was(make):
    a, b = make(), make()
    residuals = [(3.0, 0.1), (0.1, 3.0), (5.0, 0.1), (1.0, 1.0), (9.0, 0.2), (9.0, 0.2), (9.0, 0.2)]
    for r in residuals[:3]:
        a.advance(*r)
    b.load_state_dict(a.state_dict())
    for r in residuals[3:]:
        assert (a.advance(*r), a.restart) == (b.advance(*r), b.restart)
    other = Constant() if make is not Constant else Ramp()
    with pytest.raises(PlanError, match=f"kind got '{make.__name__}'"):
        other.load_state_dict(a.state_dict())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Constant(0.0), "Constant: rho got 0.0, wanted a positive number"),
        (lambda: Constant(math.nan), "Constant: rho got nan"),
        (lambda: MultiStage([]), "rhos got none"),
        (lambda: MultiStage([1e-3, -1.0]), "rhos got -1.0"),
        (lambda: MultiStage([1e-3], iterations=0), "iterations got 0"),
        (lambda: ResidualBalancing(mu=1.0), "both above 1"),
        (lambda: ResidualBalancing(rho=1.0, high=0.5), "rho got 1.0, wanted 1e-08 <= rho <= 0.5"),
        (lambda: Ramp(kind="quadratic"), "kind got 'quadratic', wanted one of linear, cosine, geometric"),
        (lambda: Ramp(iterations=0), "iterations got 0"),
    ],
)
def test_errors(make, words):
    with pytest.raises(PlanError, match=words):
        make()
