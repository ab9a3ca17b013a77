"""ADMM: the updates by hand, convergence to known optima, the known mistakes, masks under optimizers, bad input."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from structadmm.admm import ADMM, Masks
from structadmm.constraints import Constraint, density, holds, keeps_mask, mixture_keeps, project_update_
from structadmm.errors import PlanError
from structadmm.groups import STRUCTURES, expand_keep, n_groups
from structadmm.plan import Plan, Rule, Spec
from structadmm.reference import group_sumsq, topk_keep
from structadmm.schedules import Constant, MultiStage, ResidualBalancing, Schedule


def one_layer(rate=0.5, structure="column", name="0", rho=None, block=8):
    return Plan((Rule(name, (Spec(structure, rate, block),), rho=rho),))


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.Flatten(), nn.Linear(72, 4)
    return nn.Sequential(*layers).to(dtype)


def three():
    return Plan(
        (
            Rule("0", (Spec("block_column", 0.7, 4),), rho=2e-2),
            Rule("2", (Spec("filter", 0.5), Spec("column", 0.6))),
            Rule("4", (Spec("channel", 0.8),)),
        )
    )


def train(model, optimizer, steps=3, admm=None, seed=1):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 5, 5, generator=gen).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        if admm is not None:
            admm.add_penalty_grad_()
        optimizer.step()


def bits(t):
    return t.contiguous().view(torch.int32)


# The updates.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_iteration_by_hand(dtype):
    model = net(dtype)
    w0 = model[0].weight.detach().float().clone()
    admm = ADMM(model, one_layer(0.6), rho=0.25)
    z0 = admm.z("0").clone()
    keep = topk_keep(group_sumsq(w0, "column"), 11)  # 27 columns less the floor of 16.2
    assert torch.equal(z0, torch.where(expand_keep(keep, "column", w0.shape), w0, 0.0))
    assert not admm.u("0").any() and admm.z("0").dtype == torch.float32
    train(model, torch.optim.SGD(model.parameters(), 0.1), admm=admm)
    w = model[0].weight.detach().float()
    report = admm.step()
    keep = topk_keep(group_sumsq(w, "column"), 11)
    z = torch.where(expand_keep(keep, "column", w0.shape), w, 0.0)
    assert torch.equal(admm.z("0"), z) and torch.equal(admm.u("0"), w - z)
    assert (report.iteration, report.rho, report.next_rho) == (1, 0.25, 0.25)
    assert math.isclose(report.primal, float((w - z).double().norm()), rel_tol=1e-6)
    assert math.isclose(report.dual, 0.25 * float((z - z0).double().norm()), rel_tol=1e-6)
    n = w.numel()
    norms = [float(t.double().norm()) for t in (w, z)]
    assert math.isclose(report.eps_primal, math.sqrt(n) * 1e-6 + 1e-3 * max(norms), rel_tol=1e-6)
    assert math.isclose(report.eps_dual, math.sqrt(n) * 1e-6 + 1e-3 * 0.25 * float((w - z).norm()), rel_tol=1e-5)
    assert math.isclose(report.layers["0"].relative, report.primal / norms[0], rel_tol=1e-6)


def test_several_layers_add_up_and_a_rule_may_have_its_own_rho():
    model = net()
    admm = ADMM(model, three(), rho=0.01)
    assert (admm.rho("0"), admm.rho("2"), admm.rho("4")) == (0.02, 0.01, 0.01)
    train(model, torch.optim.SGD(model.parameters(), 0.1), admm=admm)
    report = admm.step()
    assert math.isclose(report.primal, math.hypot(*(la.primal for la in report.layers.values())), rel_tol=1e-12)
    assert math.isclose(report.dual, math.hypot(*(la.dual for la in report.layers.values())), rel_tol=1e-12)


def test_the_penalty_acts_on_a_weight_without_gradient():
    model = net()
    admm = ADMM(model, three(), rho=0.5)
    admm.add_penalty_grad_()
    w = model[2].weight
    torch.testing.assert_close(w.grad, 0.5 * (w - admm.z("2")).detach())
    assert model[0].bias.grad is None
    model[2].zero_grad()
    admm.add_penalty_grad_(loss_scale=1024.0)
    torch.testing.assert_close(w.grad, 512 * (w - admm.z("2")).detach())


def test_a_gradient_of_another_layout_than_the_weight():
    model = net()
    admm = ADMM(model, one_layer(name="2"), rho=0.5)
    w = model[2].weight
    g = torch.randn_like(w)
    w.grad = g.clone().to(memory_format=torch.channels_last)
    assert w.grad.stride() != w.stride()
    admm.add_penalty_grad_()
    torch.testing.assert_close(w.grad, g + 0.5 * (w - admm.z("2")).detach())


def test_state_follows_the_layout_of_the_model():
    model, same = net(), net()
    admm, other = ADMM(model, three()), ADMM(same, three())
    model.to(memory_format=torch.channels_last)
    for m, a in ((model, admm), (same, other)):
        with torch.no_grad():
            for p in m.parameters():
                p.add_(torch.linspace(-1, 1, p.numel()).view(p.shape))
        a.step()
        a.add_penalty_grad_()
    for i in ("0", "2"):
        assert admm.z(i).stride() == model[int(i)].weight.stride()
        torch.testing.assert_close(admm.u(i), other.u(i))
        torch.testing.assert_close(model[int(i)].weight.grad, same[int(i)].weight.grad)


# Convergence.


def least_squares(seed=0):
    """min 1/2 ||X W^T - Y||^2 over W [6, 5] with at most two nonzero columns. X is near to orthogonal, so that supports
    are well separated; the optimum is found by solving all ten supports exactly."""
    gen = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(20, 5, generator=gen, dtype=torch.float64))[0]
    x = q @ (torch.eye(5, dtype=torch.float64) + 0.1 * torch.randn(5, 5, generator=gen, dtype=torch.float64))
    truth = torch.randn(6, 5, generator=gen, dtype=torch.float64) * torch.tensor([0.3, 2.0, 0.2, 0.4, 3.0])
    y = x @ truth.T + 0.01 * torch.randn(20, 6, generator=gen, dtype=torch.float64)
    best = None
    for support in itertools.combinations(range(5), 2):
        w = torch.zeros(6, 5, dtype=torch.float64)
        w[:, list(support)] = torch.linalg.lstsq(x[:, list(support)], y).solution.T
        loss = float((x @ w.T - y).square().sum()) / 2
        if best is None or loss < best[0]:
            best = (loss, w)
    return x, y, best[1]


def exact_w_step(model, admm, x, y):
    """argmin over W of 1/2 ||X W^T - Y||^2 + rho/2 ||W - Z + U||^2, in closed form."""
    rho, t = admm.rho("0"), (admm.z("0") - admm.u("0")).double()
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.solve(x.T @ x + rho * eye, x.T @ y + rho * t.T).T)


def linear_model(w):
    model = nn.Sequential(nn.Linear(5, 6, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(w)
    return model


class Alternate(Schedule):
    """rho times and divided by 4 in turn: the hardest case for a dual that is not rescaled."""

    def _next(self, primal, dual):
        return self.rho * (4.0 if self.iteration % 2 else 0.25)


def admm_on_least_squares(schedule, iterations=200, rescale=True):
    x, y, optimum = least_squares()
    model = linear_model(torch.linalg.lstsq(x, y).solution.T)
    admm = ADMM(model, one_layer(0.6), rho=schedule)
    for _ in range(iterations):
        exact_w_step(model, admm, x, y)
        report = admm.step()
        if not rescale:  # undo U <- U/c
            admm.u("0").mul_(report.next_rho / report.rho)
    return float((model[0].weight - optimum).detach().norm()), report


@pytest.mark.parametrize(
    "schedule",
    [
        lambda: Constant(0.5),
        lambda: Constant(3.0),
        lambda: ResidualBalancing(1e-2, mu=2.0),
        lambda: ResidualBalancing(50.0, mu=2.0),
        lambda: MultiStage([0.3, 1.0, 3.0], 30),
        lambda: Alternate(2.0),
    ],
)
def test_reaches_the_sparse_optimum_of_least_squares(schedule):
    error, report = admm_on_least_squares(schedule())
    # W is f32: a few ulp (2^-23) of weights of norm about 10, through a well-conditioned solve.
    assert error < 2e-5
    assert report.converged


def test_the_stopping_rule_is_not_met_at_the_start():
    assert not admm_on_least_squares(Constant(0.5), iterations=1)[1].converged


def test_by_gradient_steps_of_an_ordinary_optimizer():
    x, y, optimum = least_squares()
    x, y = x.float(), y.float()
    model = linear_model(torch.linalg.lstsq(x, y).solution.T)
    admm = ADMM(model, one_layer(0.6), rho=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.4)
    for _ in range(60):
        for _ in range(10):
            optimizer.zero_grad()
            ((model(x) - y).square().sum() / 2).backward()
            admm.add_penalty_grad_()
            optimizer.step()
        report = admm.step()
    assert report.converged and float((model[0].weight - optimum).detach().norm()) < 1e-4
    admm.harden_()
    assert torch.equal(model[0].weight != 0, (optimum != 0))


@pytest.mark.parametrize("rho", [3.0, 10.0, 100.0])
def test_converges_linearly_where_the_set_is_convex(rho):
    """With the support given, the set is a subspace and the problem convex: ADMM converges for every rho > 0, here from
    a poor start, to the least squares solution on the support."""
    gen = torch.Generator().manual_seed(5)
    x = torch.randn(30, 5, generator=gen, dtype=torch.float64)
    y = torch.randn(30, 6, generator=gen, dtype=torch.float64)
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[:, [1, 3]] = True
    want = torch.zeros(6, 5, dtype=torch.float64)
    want[:, [1, 3]] = torch.linalg.lstsq(x[:, [1, 3]], y).solution.T
    z, u = torch.randn(6, 5, generator=gen), torch.randn(6, 5, generator=gen)
    everything = (Constraint("column", 0.0, keep=5),)
    h = x.T @ x + rho * torch.eye(5, dtype=torch.float64)
    for _ in range(400):
        w = torch.linalg.solve(h, x.T @ y + rho * (z - u).double().T).T.float()
        project_update_(w, z, u, everything, mask=mask)
    assert float((z - want).norm()) < 1e-5 and float((w - want).norm()) < 1e-5


# The mistakes of public ADMM code, one test each.


def test_mistake_1_the_state_is_detached_and_the_gradient_has_no_hidden_factor():
    model = net()
    admm = ADMM(model, three(), rho=0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(4):
        train(model, optimizer, admm=admm)
        admm.step()
    for i in ("0", "2", "4"):
        w, z, u = model[int(i)].weight, admm.z(i), admm.u(i)
        assert not z.requires_grad and not u.requires_grad and z.grad_fn is None and u.grad_fn is None
        (auto,) = torch.autograd.grad(admm.penalty(), w)
        w.grad = None
        admm.add_penalty_grad_()
        by_hand = admm.rho(i) * (w.detach() - z + u)
        torch.testing.assert_close(w.grad, by_hand)
        torch.testing.assert_close(auto, by_hand)


def test_mistake_2_the_penalty_is_squared():
    model = linear_model(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
    admm = ADMM(model, one_layer(0.6), rho=0.3)
    z, w = admm.z("0").clone(), model[0].weight
    d = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    for factor in (1.0, 10.0):  # the gradient grows with the distance, and the penalty with its square
        with torch.no_grad():
            w.copy_(z + factor * d)
        w.grad = None
        admm.add_penalty_grad_()
        torch.testing.assert_close(w.grad, 0.3 * factor * d, rtol=1e-4, atol=1e-5)
        assert math.isclose(float(admm.penalty().detach()), 0.15 * factor**2 * float(d.square().sum()), rel_tol=1e-5)


def test_mistake_3_z_is_not_the_weight():
    model = net()
    plan = Plan(tuple(Rule(i, (Spec("column", 0.0),)) for i in ("0", "2", "4")))  # Proj is the identity here
    admm = ADMM(model, plan, rho=1.0)
    before = {i: model[int(i)].weight.detach().clone() for i in ("0", "2", "4")}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    admm.add_penalty_grad_()
    for i, w in before.items():
        assert torch.equal(admm.z(i), w)
        torch.testing.assert_close(model[int(i)].weight.grad, torch.ones_like(w))
    admm.step()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(admm.z("0"), before["0"] + 1.0)


def test_mistake_4_the_dual_is_rescaled_when_rho_changes():
    error, _ = admm_on_least_squares(Alternate(2.0))
    wrong, _ = admm_on_least_squares(Alternate(2.0), rescale=False)
    assert error < 2e-5 and wrong > 1e-2

    model = net()
    admm = ADMM(model, three(), rho=MultiStage([1e-2, 8e-2, 1.0], 1, restart=False))
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    other = ADMM(model, three(), rho=1e-2)
    other.load_state_dict({**admm.state_dict(), "schedule": other.schedule.state_dict()})
    report = admm.step()
    other.step()
    assert report.next_rho == 8e-2
    for i in ("0", "2", "4"):  # rho U stays; a power of two divides exactly
        assert torch.equal(admm.u(i) * 8, other.u(i)) and math.isclose(admm.rho(i), 8 * other.rho(i))


def test_mistake_4_or_a_stage_starts_anew():
    model = net()
    admm = ADMM(model, three(), rho=MultiStage([1e-2, 1e-1], 1, restart=True))
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    admm.step()
    fresh = ADMM(model, three())
    for i in ("0", "2", "4"):
        assert torch.equal(admm.z(i), fresh.z(i)) and not admm.u(i).any()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_mistake_5_ties_leave_exactly_k_groups(structure):
    model = nn.Sequential(nn.Conv2d(6, 10, 3, groups=2))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    n = n_groups(structure, (10, 3, 3, 3), 2, 5)
    admm = ADMM(model, one_layer(0.5, structure, block=5))
    masks = admm.harden_()
    want = expand_keep(torch.arange(n) < n - n // 2, structure, (10, 3, 3, 3), 2, 5)
    assert torch.equal(masks["0"], want) and torch.equal(model[0].weight != 0, want)
    assert torch.equal(admm.z("0") != 0, want)


def test_mistake_6_a_group_whose_sum_is_zero_is_not_empty():
    w = torch.tensor([[1.0, 0.1, 0.0], [-1.0, 0.1, 0.0]])
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(w)
    assert Masks.from_zeros(model)["0"].all(0).tolist() == [True, True, False]
    ADMM(model, one_layer(0.6)).harden_()
    assert torch.equal(model[0].weight.detach(), torch.tensor([[1.0, 0.1, 0.0], [-1.0, 0.1, 0.0]]))
    ADMM(model, one_layer(0.67)).harden_()
    assert torch.equal(model[0].weight.detach(), torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "nesterov_foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-2, amsgrad=True),
    "adam_fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_mistake_7_zeros_stay_zero_under_every_optimizer(kind):
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, 4)  # so that there is momentum at the places that are about to be masked
    masks = ADMM(model, three()).harden_()
    free = copy.deepcopy(model)
    loose = OPTIMIZERS[kind](free.parameters())
    loose.load_state_dict(optimizer.state_dict())
    train(free, loose, 1)
    assert any((free.get_submodule(n).weight[~m] != 0).any() for n, m in masks.items())  # without the hold they move

    hold = masks.hold(optimizer)
    before = {n: model.get_submodule(n).weight.detach().clone() for n in masks}
    for _ in range(3):
        train(model, optimizer, 1)
        for name, mask in masks.items():
            w = model.get_submodule(name).weight
            assert not bits(w.detach())[~mask].any()  # +0.0, not -0.0
            for value in optimizer.state[w].values():
                if isinstance(value, torch.Tensor) and value.shape == w.shape:
                    assert not value[~mask].any()
    for name, mask in masks.items():
        moved = (model.get_submodule(name).weight != before[name]) & mask
        assert moved.any()
    version = model[2].weight._version
    hold.remove()
    assert model[2].weight._version == version
    with masks.hold(optimizer):  # torch and caches of packed weights see that the weights were written to
        assert model[2].weight._version > version
    train(model, optimizer, 2)
    assert any((model.get_submodule(n).weight[~m] != 0).any() for n, m in masks.items())


def test_hold_is_the_training_of_the_kept_weights_alone():
    """Momentum SGD treats entries one by one: held training equals training with masked gradients from no momentum."""
    held, plain = net(), net()
    masks = ADMM(held, three()).harden_()
    Masks(plain, masks).apply_()
    for name, mask in masks.items():
        plain.get_submodule(name).weight.register_hook(lambda g, m=mask: torch.where(m, g, 0.0))
    a, b = (OPTIMIZERS["nesterov"](m.parameters()) for m in (held, plain))
    masks.hold(a)
    train(held, a, 4)
    train(plain, b, 4)
    for p, q in zip(held.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


class Normalised(torch.optim.Optimizer):
    """Steps of equal length: mixes the entries of a tensor, as LAMB and Muon do."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(0.1 * p.grad / p.grad.norm())


def test_gradients_of_masked_weights_do_not_reach_the_kept_ones():
    model = net()
    masks = ADMM(model, three()).harden_()
    before = {n: model.get_submodule(n).weight.detach().clone() for n in masks}
    optimizer = Normalised([model.get_submodule(n).weight for n in masks])
    masks.hold(optimizer)
    train(model, optimizer, 1)
    for name, w in before.items():
        # The kept weights make the whole step: its length is 0.1, up to rounding of weights below 1 (2^-24 each).
        length = float((model.get_submodule(name).weight.detach() - w).norm())
        assert math.isclose(length, 0.1, rel_tol=1e-5)


def test_hold_with_a_gradient_scaler_that_skips_steps():
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    masks = ADMM(model, three()).harden_()
    masks.hold(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    moved = []
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(2, 3, 5, 5)).square().mean() * (math.inf if step == 1 else 1.0)).backward()
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(before, model[0].weight))
        for name, mask in masks.items():
            assert not bits(model.get_submodule(name).weight.detach())[~mask].any()
    assert moved == [True, False, True, True]


def test_hold_with_a_closure():
    model = net()
    masks = ADMM(model, three()).harden_()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)
    masks.hold(optimizer)
    x = torch.randn(4, 3, 5, 5)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    for _ in range(3):
        optimizer.step(closure)
        for name, mask in masks.items():
            assert not bits(model.get_submodule(name).weight.detach())[~mask].any()
    assert losses[-1] < losses[0]


# Mixtures.


def sequential(v, constraints, order):
    """Projecting on one structure after the other."""
    mask = torch.ones(v.shape, dtype=torch.bool)
    for i in order:
        c = constraints[i]
        keep = topk_keep(group_sumsq(v, c.structure, 1, c.block, mask=mask), c.keep)
        mask &= expand_keep(keep, c.structure, v.shape, 1, c.block)
    return float(v[mask].double().square().sum())


@pytest.mark.parametrize("seed", range(3))
def test_mixtures_against_brute_force_and_against_one_after_the_other(seed):
    gen = torch.Generator().manual_seed(seed)
    rows_columns = (Constraint("filter", 0.5, keep=2), Constraint("column", 0.5, keep=3))
    agree, better, cases = 0, 0, 40
    for _ in range(cases):
        v = torch.randn(4, 6, generator=gen)
        mask = keeps_mask(mixture_keeps(v, None, rows_columns), rows_columns, v.shape)
        assert mask.any(1).sum() == 2 and mask.any(0).sum() == 3
        got = float(v[mask].double().square().sum())
        best = max(
            float(v[list(r)][:, list(c)].double().square().sum())
            for r in itertools.combinations(range(4), 2)
            for c in itertools.combinations(range(6), 3)
        )
        naive = [sequential(v, rows_columns, order) for order in ((0, 1), (1, 0))]
        # Scores are f32 sums of at most 24 squares, rounded once: equal values may differ by 2^-24 relative.
        slack = 1 + 2**-22
        assert max(naive) <= got * slack and got <= best * slack
        agree += got * slack >= best
        better += got > max(naive) * slack
        for fixed, free in ((1, 0), (0, 1)):  # no change of one structure alone improves it
            keeps = mixture_keeps(v, None, rows_columns)
            other = expand_keep(keeps[fixed], rows_columns[fixed].structure, v.shape)
            scores = group_sumsq(v, rows_columns[free].structure, mask=other)
            top = topk_keep(scores, rows_columns[free].keep)
            assert float(scores[top].sum()) <= float(scores[keeps[free]].sum()) * slack
    # Local search on random matrices: it finds the optimum mostly, and improves on one-after-the-other now and then.
    assert agree >= 0.8 * cases and better >= 1


def test_a_separable_mixture_is_solved_exactly():
    # |v_ij| = a_i b_j: the kept norm is (sum of a_i^2) (sum of b_j^2), so the best rows and the best columns are best.
    a, b = torch.tensor([3.0, 1.0, 2.0, 0.5]), torch.tensor([1.0, 4.0, 2.0, 8.0, 0.5])
    constraints = (Constraint("filter", 0.5, keep=2), Constraint("column", 0.4, keep=3))
    rows, columns = mixture_keeps(a[:, None] * b, None, constraints)
    assert rows.tolist() == [True, False, True, False] and columns.tolist() == [False, True, True, True, False]


def test_three_structures_and_a_mask():
    gen = torch.Generator().manual_seed(0)
    w, z, u = torch.randn(12, 4, 3, 3, generator=gen), torch.zeros(12, 4, 3, 3), torch.zeros(12, 4, 3, 3)
    mask = torch.rand(w.shape, generator=gen) < 0.7
    cs = (Constraint("filter", 0.5, keep=6), Constraint("channel", 0.25, keep=3), Constraint("element", 0.9, keep=40))
    keeps, sums = project_update_(w, z, u, cs, mask=mask)
    on = z != 0
    assert holds(on, cs) and on.sum() == 40 and not on[~mask].any()
    assert torch.equal(z[on], w[on]) and torch.equal(u, w - z)
    assert [int(k.sum()) for k in keeps] == [6, 3, 40]
    assert math.isclose(float(sums[3]), float(z.double().square().sum()), rel_tol=16 * 2**-24)  # f32 in pieces
    assert on.sum() <= density(cs, w.shape) * w.numel() + 1e-9


@pytest.mark.parametrize("structure", ["channel", "column", "block_column"])
@pytest.mark.parametrize("conv_groups", [1, 2, 3])
@pytest.mark.parametrize("filters", [True, False])
def test_density_is_the_most_that_a_mask_can_keep(structure, conv_groups, filters):
    """Against every choice of groups, with the filters that have most weights in them."""
    shape = (6, 2, 2)
    n = n_groups(structure, shape, conv_groups, 4)
    for keep, rows in itertools.product(range(1, n + 1), range(1, 7) if filters else (6,)):
        cs = (Constraint(structure, 0.5, 4, keep), *([Constraint("filter", 0.5, keep=rows)] if filters else []))
        most = round(density(cs, shape, conv_groups) * 24)
        if math.comb(n, keep) <= 70:
            masks = (
                expand_keep(
                    torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(kept), True),
                    structure,
                    shape,
                    conv_groups,
                    4,
                )
                for kept in itertools.combinations(range(n), keep)
            )
            found = max(int(m.flatten(1).sum(1).sort(descending=True).values[:rows].sum()) for m in masks)
            assert found == most, (keep, rows)
        got = keeps_mask(mixture_keeps(torch.ones(shape), None, cs, conv_groups), cs, shape, conv_groups)
        assert int(got.sum()) <= most


# Progressive rounds.


def test_zeros_of_former_rounds_stay_and_finished_layers_rest():
    model = net()
    plan = Plan((Rule("2", (Spec("column", (0.5, 0.75)),)), Rule("4", (Spec("channel", (0.5, 0.5)),))))
    first = ADMM(model, plan.at_step(0), rho=0.1).harden_()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    hold = first.hold(optimizer)
    train(model, optimizer)
    admm = ADMM(model, plan.at_step(1), rho=0.1, masks=first)
    assert admm.rho("2") == 0.1 and admm.rho("4") == 0.0
    grads = torch.zeros_like(model[4].weight)
    model.zero_grad()
    admm.add_penalty_grad_()
    assert model[4].weight.grad is None or torch.equal(model[4].weight.grad, grads)
    for _ in range(3):
        train(model, optimizer, admm=admm)
        report = admm.step()
        assert not admm.z("2")[~first["2"]].any() and not admm.u("2")[~first["2"]].any()
    assert report.layers["4"].rho == 0.0 and math.isclose(report.primal, report.layers["2"].primal)
    # The tolerance, like the sums, is of the layers that still move.
    n, norms = 216, [float(t.detach().double().norm()) for t in (model[2].weight, admm.z("2"))]
    assert math.isclose(report.eps_primal, 1e-6 * math.sqrt(n) + 1e-3 * max(norms), rel_tol=1e-6)
    second = admm.harden_()
    assert torch.equal(second["4"], first["4"])
    assert not (second["2"] & ~first["2"]).any() and second["2"].sum() < first["2"].sum()
    hold.remove()
    assert second.report().kept == int((model[2].weight != 0).sum() + (model[4].weight != 0).sum())


def test_weights_that_came_back_outside_the_masks_do_not_count():
    model = net()
    first = ADMM(model, one_layer(0.5, name="2")).harden_()
    with torch.no_grad():
        model[2].weight[~first["2"]] = 9.0
    second = ADMM(model, one_layer(0.8, name="2"), masks=first).harden_()
    assert not (second["2"] & ~first["2"]).any() and (model[2].weight[~first["2"]] == 0).all()
    assert second["2"].sum() == 4 * (54 - 43)  # 54 columns in two conv groups, of 4 filters each


def test_masks_of_layers_outside_the_plan_are_handed_on():
    model = net()
    first = ADMM(model, one_layer(name="2")).harden_()
    both = ADMM(model, one_layer(name="4"), masks=first).harden_()
    assert set(both) == {"2", "4"} and torch.equal(both["2"], first["2"])


# State.


def test_state_resumes_bit_for_bit():
    model = net()
    admm = ADMM(model, three(), rho=ResidualBalancing(1e-2, mu=1.5))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3):
        train(model, optimizer, admm=admm)
        admm.step()
    other = copy.deepcopy(model)
    late = torch.optim.Adam(other.parameters(), 0.01)
    late.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = ADMM(other, three(), rho=ResidualBalancing(1e-2, mu=1.5))
    resumed.load_state_dict(admm.state_dict())
    for m, o, a in ((model, optimizer, admm), (other, late, resumed)):
        for _ in range(3):
            train(m, o, admm=a)
            report = a.step()
    assert report.iteration == 6 and admm.schedule.rho == resumed.schedule.rho != 1e-2
    for i in ("0", "2", "4"):
        assert torch.equal(bits(admm.z(i)), bits(resumed.z(i))) and torch.equal(bits(admm.u(i)), bits(resumed.u(i)))
        assert torch.equal(bits(model[int(i)].weight.detach()), bits(other[int(i)].weight.detach()))


def test_state_is_a_copy_and_loads_with_weights_only(tmp_path):
    model = net()
    masks = ADMM(model, one_layer(name="2")).harden_()
    admm = ADMM(model, three(), masks=masks)
    state = admm.state_dict()
    torch.save(state, tmp_path / "a.pt")
    admm.z("0").zero_()
    assert state["layers"]["0"]["z"].any()
    admm.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert torch.equal(admm.z("0"), state["layers"]["0"]["z"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(version=2), "version got 2, wanted 1"),
        (lambda s: s["layers"].pop("2"), r"layers got other ones \('2'\)"),
        (lambda s: s["layers"]["4"].update(constraints=[["channel", 8, 3]]), "layer '4' got constraints"),
        (lambda s: s["layers"]["4"].update(z=torch.zeros(3)), "z of layer '4' got"),
        (lambda s: s["layers"]["4"].update(u=torch.zeros(4, 72).double()), "u of layer '4' got torch.float64"),
        (lambda s: s["layers"]["4"].update(mask=torch.ones(4, 72, dtype=torch.bool)), "mask of layer '4'"),
        (lambda s: s.update(schedule=ResidualBalancing().state_dict()), "kind got 'ResidualBalancing'"),
        (lambda s: s["schedule"].update(rho="big"), "Constant.load_state_dict: rho got 'big', wanted a positive"),
        (lambda s: s["schedule"].pop("iteration"), "Constant.load_state_dict: iteration got None, wanted a whole"),
        (lambda s: s.pop("schedule"), "kind got None"),
        (lambda s: s.update(iteration=None), "iteration got None, wanted a whole number"),
        (lambda s: s.update(layers=3), "layers got int"),
        (lambda s: s["layers"]["4"].pop("u"), "layer '4' got no u"),
        (lambda s: s["layers"]["4"].update(z=None), r"z of layer '4' got None, wanted torch.float32 \(4, 72\)"),
    ],
)
def test_a_foreign_state_changes_nothing(change, words):
    model = net()
    admm = ADMM(model, three())
    state = copy.deepcopy(admm.state_dict())
    state["iteration"] = 7
    state["layers"]["0"]["z"].fill_(1.0)
    change(state)
    before = admm.state_dict()
    with pytest.raises(PlanError, match=words):
        admm.load_state_dict(state)
    after = admm.state_dict()
    assert after["iteration"] == 0 and after["schedule"] == before["schedule"]
    assert torch.equal(after["layers"]["0"]["z"], before["layers"]["0"]["z"])


def test_a_mask_of_another_shape_is_not_spread_over_the_layer():
    model = net()
    admm = ADMM(model, one_layer(name="2"), masks={"2": torch.ones(8, 3, 3, 3, dtype=torch.bool)})
    state = admm.state_dict()
    state["layers"]["2"]["mask"] = torch.zeros(3, dtype=torch.bool)
    with pytest.raises(PlanError, match=r"mask of layer '2' got torch.bool \(3,\), wanted torch.bool \(8, 3, 3, 3\)"):
        admm.load_state_dict(state)
    assert admm.state_dict()["layers"]["2"]["mask"].all()


# Masks.


def test_masks_from_zeros_report_and_state():
    model = net()
    with torch.no_grad():
        model[2].weight[:4] = -0.0
    masks = Masks.from_zeros(model)
    assert list(masks) == ["0", "2", "4"] and not masks["2"][:4].any() and masks["2"][4:].all()
    report = masks.report()
    assert (report.weights, report.kept) == (162 + 216 + 288, 162 + 108 + 288)
    assert math.isclose(report.compression, 666 / 558) and "50.00%" in str(report)
    masks.apply_()
    assert not torch.signbit(model[2].weight[:4]).any()
    again = Masks(net(), {})
    again.load_state_dict(masks.state_dict())
    again.apply_()
    assert not again.model[2].weight[:4].any() and all(torch.equal(again[n], masks[n]) for n in masks)


def test_masks_clear_what_is_not_finite():
    model = net()
    with torch.no_grad():
        model[0].weight[0] = math.nan
    Masks(model, {"0": (torch.arange(6) > 0).view(6, 1, 1, 1).expand(6, 3, 3, 3)}).apply_()
    assert not bits(model[0].weight.detach())[0].any()


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"9": torch.ones(2, dtype=torch.bool)}, "layer got '9', wanted the name of a module of Sequential"),
        ({"1": torch.ones(2, dtype=torch.bool)}, "layer '1' got ReLU"),
        (
            {"0": torch.ones(2, dtype=torch.bool)},
            r"mask of layer '0' got torch.bool \(2,\), wanted torch.bool \(6, 3, 3, 3\)",
        ),
        ({"0": torch.ones(6, 3, 3, 3)}, "mask of layer '0' got torch.float32"),
        ({"0": None}, "mask of layer '0' got NoneType"),
    ],
)
def test_bad_masks(masks, words):
    with pytest.raises(PlanError, match=words):
        Masks(net(), masks)


def test_hold_wants_an_optimizer_of_the_same_model():
    masks = ADMM(net(), three()).harden_()
    with pytest.raises(PlanError, match="optimizer got none of the masked weights"):
        masks.hold(torch.optim.SGD(net().parameters(), 0.1))


# Bad input.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("call", ["step", "harden_"])
def test_weights_that_are_not_finite_change_nothing(bad, call):
    model = net()
    admm = ADMM(model, three(), rho=ResidualBalancing())
    train(model, torch.optim.SGD(model.parameters(), 0.1), admm=admm)
    admm.step()
    with torch.no_grad():
        model[4].weight[1, 2] = bad
    before, weights = admm.state_dict(), copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=f"ADMM.{call}: weight of layer '4' got NaN, infinite or huge values"):
        getattr(admm, call)()
    after = admm.state_dict()
    assert after["iteration"] == before["iteration"] and after["schedule"] == before["schedule"]
    for i, layer in before["layers"].items():
        assert torch.equal(layer["z"], after["layers"][i]["z"]) and torch.equal(layer["u"], after["layers"][i]["u"])
    assert all(torch.equal(weights[k].nan_to_num(), v.nan_to_num()) for k, v in model.state_dict().items())
    with pytest.raises(PlanError, match="ADMM: weight of layer '4' got NaN"):
        ADMM(model, three())


def test_other_bad_input():
    with pytest.raises(PlanError, match="weight of layer '0' got torch.float64, wanted one of torch.float32"):
        ADMM(net(torch.float64), three())
    with pytest.raises(PlanError, match="weight of layer '0' got device meta, wanted cpu or cuda"):
        ADMM(net().to("meta"), three())
    for state_of in (ADMM.rho, ADMM.z, ADMM.u):
        with pytest.raises(PlanError, match="layer got '1', wanted one of 0, 2, 4"):
            state_of(ADMM(net(), three()), "1")
    with pytest.raises(PlanError, match="plan got str, wanted a Plan"):
        ADMM(net(), "column")
    model = net()
    model[2].weight.requires_grad_(False)
    with pytest.raises(PlanError, match="weight of layer '2' got requires_grad=False"):
        ADMM(model, three())
    for rho in (0.0, -1.0, math.nan, "big"):
        with pytest.raises(PlanError, match="rho got .*, wanted a positive number"):
            ADMM(net(), three(), rho=rho)
    model = net()
    admm = ADMM(model, three())
    model[4] = nn.Linear(72, 5)
    with pytest.raises(PlanError, match=r"weight of layer '4' got shape \(5, 72\), wanted \(4, 72\)"):
        admm.step()
    model = net()
    admm = ADMM(model, three())
    model[0].weight.grad = torch.zeros_like(model[0].weight).to_sparse()
    with pytest.raises(PlanError, match="grad of layer '0' got a sparse one"):
        admm.add_penalty_grad_()
