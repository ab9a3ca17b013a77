"""Which rate for which layer: choices that cost least and spend at most so much.

Every set of layers that are pruned together has some choices, the first of which prunes nothing. A choice has a cost
(the accuracy that it is thought to lose) and an expense (seconds, multiply-adds or weights); one choice per set.
`knapsack` is for expenses that add up, and exact up to its steps; `descend` for any function of the choices, such as
the time of layers that shrink when their neighbours lose filters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Steps that the limit is divided into: the choice of n sets spends at most n / STEPS of the room less than it may.
STEPS = 1 << 14
# Relative: a sum of floats in another order is as good.
_ROUNDING = 1e-9


def knapsack(costs: Sequence[Floats], expenses: Sequence[Floats], limit: float) -> list[int] | None:
    """Per set the number of a choice, so that the expenses sum up to at most `limit` and the costs to the least
    possible.

    costs, expenses: [choices] per set, any length. Returns None where no choice spends so little. Dynamic programming
    over what is left of the limit, in steps of (limit - least expense) / STEPS to which expenses are rounded up: what
    it returns keeps to the limit, and costs no more than any choice that keeps to the limit less one step a set.
    """
    least = [e.min() for e in expenses]
    room = limit - sum(least)
    slack = _ROUNDING * max(abs(limit), sum(abs(e).max() for e in expenses))
    if room < -slack:
        return None
    step = max(room, slack) / STEPS
    best = np.zeros(STEPS + 1)  # [steps left]: least cost of the sets so far
    taken: list[npt.NDArray[np.int64]] = []
    for cost, expense, low in zip(costs, expenses, least, strict=True):
        steps = np.ceil((expense - low) / step * (1 - _ROUNDING)).astype(np.int64)
        found, chosen = np.full(STEPS + 1, np.inf), np.zeros(STEPS + 1, np.int64)
        for i, (c, s) in enumerate(zip(cost, steps, strict=True)):
            if s > STEPS:
                continue
            with_it = np.full(STEPS + 1, np.inf)
            with_it[s:] = best[: STEPS + 1 - s] + c
            better = with_it < found
            found[better], chosen[better] = with_it[better], i
        best = found
        taken.append(chosen * (STEPS + 1) + steps[chosen])
    at, choice = STEPS, []
    for row in reversed(taken):
        i, s = divmod(int(row[at]), STEPS + 1)
        choice.append(i)
        at -= s
    return choice[::-1]


def descend(costs: Sequence[Floats], expense: Callable[[Sequence[int]], float], limit: float) -> list[int] | None:
    """As knapsack for an expense of any form, by steepest descent; None where the last choices of all spend too much.

    From the first choices of all, the change that costs least per unit saved is taken, any number of choices ahead,
    until the limit is kept. Then single changes, and pairs (one set gives back, another saves for it, by one or two
    choices each), are taken as long as they lower the cost within the limit. What it returns can't be improved by one
    such change; it need not be the least of all, which is a hard problem for expenses that are products.
    """
    state = [0] * len(costs)
    limit += _ROUNDING * abs(limit)
    last = [len(c) - 1 for c in costs]
    if expense(last) > limit:
        return None

    def with_(changes: Sequence[tuple[int, int]]) -> list[int]:
        new = list(state)
        for s, i in changes:
            new[s] = i
        return new

    now = expense(state)
    while now > limit:
        best: tuple[float, float, int, int] | None = None
        for s, cost in enumerate(costs):
            for i in range(state[s] + 1, len(cost)):
                after = expense(with_([(s, i)]))
                if after >= now:
                    continue
                # What is saved beyond the limit is worth nothing.
                rate = (cost[i] - cost[state[s]]) / (now - max(after, limit))
                if best is None or (rate, after) < best[:2]:
                    best = (rate, after, s, i)
        if best is None:  # no single change saves: all of them together do
            state, now = last, expense(last)
            break
        _, now, s, i = best
        state[s] = i
    while (better := _improvement(costs, expense, limit, state, with_)) is not None:
        state = better
    return state


def _improvement(
    costs: Sequence[Floats],
    expense: Callable[[Sequence[int]], float],
    limit: float,
    state: Sequence[int],
    with_: Callable[[Sequence[tuple[int, int]]], list[int]],
) -> list[int] | None:
    """The neighbour within the limit that costs least, if that is less than the state's."""
    best: tuple[float, list[int]] | None = None
    for s, cost in enumerate(costs):
        for i, c in enumerate(cost):
            gain = cost[state[s]] - c
            if gain <= _ROUNDING * abs(cost).max():
                continue
            back = with_([(s, i)])
            candidates: list[tuple[float, list[tuple[int, int]]]] = []
            if expense(back) <= limit:
                candidates = [(gain, [(s, i)])]
            elif abs(i - state[s]) <= 2:
                for t, other in enumerate(costs):
                    for j in (state[t] + 1, state[t] + 2):
                        if t != s and j < len(other) and other[j] - other[state[t]] < gain:
                            candidates.append((gain - (other[j] - other[state[t]]), [(s, i), (t, j)]))
            for value, changes in candidates:
                if (best is None or value > best[0]) and expense(with_(changes)) <= limit:
                    best = (value, with_(changes))
    return None if best is None else best[1]
