"""What to prune: rules by layer name, resolved against a model into one set of constraints per layer.

A recipe holds a plan as a TOML table:

    [plan]
    steps = [0.5, 0.8, 1.0]          # progressive rounds; optional
    [[plan.rule]]
    match = "layer*.conv?"           # fnmatch pattern of module names; the first rule that matches a layer decides
    structure = "block_column"       # filter, channel, column, block_column, element
    rate = 0.9                       # share of the groups to remove; or one rate per round
    block = 8                        # block_column only
    rho = 1e-3                       # optional: this layer's own first rho
    [[plan.rule]]
    match = "layer4.*"
    constraints = [{structure = "filter", rate = 0.5}, {structure = "column", rate = 0.8}]
    [[plan.rule]]
    match = "head.*"
    skip = "too small to matter"     # the reason is kept, and printed

The first convolution and the classifier (the last linear layer), in order of registration, are left alone unless a rule
names them exactly, without a wildcard.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .constraints import Constraint, density
from .errors import PlanError
from .groups import DEFAULT_BLOCK, STRUCTURES, n_groups
from .layers import layer_table

__all__ = ["Constraint", "LayerPlan", "Plan", "ResolvedPlan", "Rule", "Spec"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRUNABLE = (*_CONVS, nn.Linear)
# Layers with a weight matrix that someone might expect to be pruned: named with a reason instead of passed over.
_UNSUPPORTED = (
    nn.modules.conv._ConvTransposeNd,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
_FIRST = "first convolution: few weights, and all of the input passes through it"
_LAST = "classifier: the last linear layer"


@dataclass(frozen=True)
class Spec:
    """One structure and the share of its groups to remove: one rate, or one for each progressive round."""

    structure: str
    rate: float | tuple[float, ...]
    block: int = DEFAULT_BLOCK

    def __str__(self) -> str:
        rates = self.rate if isinstance(self.rate, tuple) else (self.rate,)
        name = self.structure + (f"({self.block})" if self.structure == "block_column" else "")
        return f"{', '.join(f'{r:.4g}' for r in rates)} of {name} groups"


@dataclass(frozen=True)
class Rule:
    """What happens to the layers whose name matches: constraints (all hold at once), or skip with the reason."""

    match: str
    constraints: tuple[Spec, ...] = ()
    skip: str | None = None
    rho: float | None = None

    def __str__(self) -> str:
        what = " + ".join(map(str, self.constraints)) if self.skip is None else f"left alone: {self.skip}"
        return f"{self.match}: {what}"

    @property
    def exact(self) -> bool:
        return not any(c in self.match for c in "*?[")


@dataclass(frozen=True)
class LayerPlan:
    """A layer to prune: its weight's shape, and what must hold. `macs`: dense multiply-adds per example, if counted."""

    name: str
    shape: tuple[int, ...]
    conv_groups: int
    constraints: tuple[Constraint, ...]
    rho: float | None = None
    macs: int | None = None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """The largest share of the weights that may stay (see constraints.density)."""
        return density(self.constraints, self.shape, self.conv_groups)

    def groups(self, constraint: Constraint) -> int:
        """How many groups of this constraint's structure the layer has."""
        return n_groups(constraint.structure, self.shape, self.conv_groups, constraint.block)


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan that has met its model: the layers to prune, and those left alone (name -> reason). Prints as a table.

    `other_weights`, `other_macs`: of the convolutions and linear layers left alone, so that totals are of the network.
    """

    layers: tuple[LayerPlan, ...]
    skipped: Mapping[str, str]
    other_weights: int = 0
    other_macs: int | None = None

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def totals(self) -> dict[str, float | int | None]:
        """Weights and multiply-adds (per example; None if not counted) before and after, of all convs and linears.

        What is kept is an upper bound where LayerPlan.density is one.
        """
        weights = self.other_weights + sum(la.weights for la in self.layers)
        kept = self.other_weights + round(sum(la.weights * la.density for la in self.layers))
        out: dict[str, float | int | None] = {
            "weights": weights,
            "weights_kept": kept,
            "weights_removed": 1 - kept / weights,
            "macs": None,
            "macs_kept": None,
            "macs_removed": None,
        }
        if self.other_macs is not None:
            macs = self.other_macs + sum(la.macs or 0 for la in self.layers)
            kept = self.other_macs + round(sum((la.macs or 0) * la.density for la in self.layers))
            out |= {"macs": macs, "macs_kept": kept, "macs_removed": 1 - kept / macs if macs else 0.0}
        return out

    def summary(self) -> str:
        """The table: groups, weights and multiply-adds removed per layer and in all, and what is left alone."""

        def share(x: float | int | None) -> str:
            return "" if x is None else f"{x:.1%}"

        def count(x: float | int | None) -> str:
            return "" if x is None else f"{x:,}"

        head = ("layer", "weight", "groups removed", "weights", "removed", "multiply-adds", "removed")
        rows = [head]
        for la in self.layers:
            what = " + ".join(f"{1 - c.keep / la.groups(c):.1%} {c}" for c in la.constraints)
            gone = 1 - la.density
            macs_gone = None if la.macs is None else gone
            shape = "x".join(map(str, la.shape))
            rows.append((la.name, shape, what, count(la.weights), share(gone), count(la.macs), share(macs_gone)))
        t = self.totals()
        figures = count(t["weights"]), share(t["weights_removed"]), count(t["macs"]), share(t["macs_removed"])
        rows.append(("all", "", "", *figures))
        width = [max(len(r[i]) for r in rows) for i in range(len(head))]
        left = (True, True, True, False, False, False, False)
        lines = [
            "  ".join(c.ljust(n) if go else c.rjust(n) for c, n, go in zip(r, width, left, strict=True)).rstrip()
            for r in rows
        ]
        lines += [f"left alone: {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)

    __str__ = summary


@dataclass(frozen=True)
class Plan:
    """Ordered rules, and the rounds of progressive pruning.

    steps: rising fractions, the last one 1; round i prunes to density (1 - rate)**steps[i], so that equal differences
    are equal factors of compression. A rule may give a tuple of rates instead, one per round. Raises PlanError.
    """

    rules: tuple[Rule, ...]
    steps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.rules:
            raise PlanError("Plan: rules got none, wanted at least one")
        for rule in self.rules:
            _check_rule(rule)
        if self.steps:
            s = self.steps
            if not all(0 < x <= 1 for x in s) or any(b <= a for a, b in pairwise(s)) or s[-1] != 1:
                raise PlanError(f"Plan: steps got {list(s)}, wanted rising fractions in (0, 1] that end at 1")
        rounds = {len(c.rate) for r in self.rules for c in r.constraints if isinstance(c.rate, tuple)}
        if self.steps:
            rounds.add(len(self.steps))
        if len(rounds) > 1:
            raise PlanError(f"Plan: rates and steps got {sorted(rounds)} rounds, wanted the same number everywhere")

    @classmethod
    def uniform(
        cls, model: nn.Module, structure: str = "column", rate: float = 0.9, block: int = DEFAULT_BLOCK
    ) -> Plan:
        """One structure and rate for every convolution and linear layer but the first conv and the classifier."""
        plan = cls((Rule("*", (Spec(structure, rate, block),)),))
        plan.resolve(model)
        return plan

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Plan:
        """The [plan] table of a TOML recipe; other tables are not looked at."""
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        with open(path, "rb") as f:
            try:
                doc = tomllib.load(f)
            except tomllib.TOMLDecodeError as e:
                raise PlanError(f"Plan.from_toml: {os.fspath(path)} got invalid TOML ({e})") from None
        if not isinstance(doc.get("plan"), dict):
            raise PlanError(f"Plan.from_toml: {os.fspath(path)} got no table [plan], wanted one")
        return cls.from_dict(doc["plan"])

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Plan:
        """A plan from the plain values of a [plan] table. Unknown keys are errors that list the known ones."""
        if not isinstance(table, Mapping):
            raise PlanError(f"plan: got {type(table).__name__}, wanted a table with rule and steps")
        _only(table, ("steps", "rule"), "plan")
        rules = table.get("rule", [])
        if not isinstance(rules, Sequence) or isinstance(rules, str) or not all(isinstance(r, Mapping) for r in rules):
            raise PlanError("plan: rule got something else, wanted tables [[plan.rule]]")
        steps = table.get("steps", [])
        if not isinstance(steps, Sequence) or not all(_is_number(s) for s in steps):
            raise PlanError(f"plan: steps got {steps!r}, wanted a list of fractions")
        return cls(tuple(_rule(r, i) for i, r in enumerate(rules)), tuple(float(s) for s in steps))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that from_dict takes back."""
        rules = []
        for r in self.rules:
            d: dict[str, Any] = {"match": r.match}
            if r.skip is not None:
                d["skip"] = r.skip
            if r.constraints:
                d["constraints"] = [_spec_dict(c) for c in r.constraints]
            if r.rho is not None:
                d["rho"] = r.rho
            rules.append(d)
        return {**({"steps": list(self.steps)} if self.steps else {}), "rule": rules}

    def __str__(self) -> str:
        rounds = [f"in {self.n_steps} rounds"] if self.n_steps > 1 else []
        return "\n".join([*map(str, self.rules), *rounds])

    @property
    def n_steps(self) -> int:
        """Rounds of progressive pruning; 1 for a plan without."""
        for r in self.rules:
            for c in r.constraints:
                if isinstance(c.rate, tuple):
                    return len(c.rate)
        return len(self.steps) or 1

    def at_step(self, i: int) -> Plan:
        """The plan of one round (0 to n_steps - 1; -1 is the last), with plain rates and no steps.

        Prune round by round, each with the masks of the one before: ADMM(model, plan.at_step(i), masks=masks).
        """
        n = self.n_steps
        if not -n <= i < n:
            raise PlanError(f"Plan.at_step: i got {i}, wanted 0 to {n - 1}")

        def rate_at(rate: float | tuple[float, ...]) -> float:
            if isinstance(rate, tuple):
                return rate[i]
            f = self.steps[i] if self.steps else 1.0
            return rate if f == 1 else 1 - (1 - rate) ** f

        rules = (
            replace(r, constraints=tuple(replace(c, rate=rate_at(c.rate)) for c in r.constraints)) for r in self.rules
        )
        return Plan(tuple(rules))

    def resolve(self, model: nn.Module, example: Tensor | tuple[Any, ...] | None = None) -> ResolvedPlan:
        """Match the rules (at their final rates) with the layers of a model.

        example: model input; with it, multiply-adds are counted per layer in one forward pass in eval mode. Raises
        PlanError naming the layer or pattern: a pattern that decides no layer, a layer that cannot be pruned and is
        named exactly, a rate that leaves no group, a plan that prunes nothing.
        """
        if self.n_steps > 1:
            return self.at_step(-1).resolve(model, example)
        if not isinstance(model, nn.Module):
            raise PlanError(f"Plan.resolve: model got {type(model).__name__}, wanted a torch.nn.Module")
        candidates, kinds = _candidates(model)
        names = dict(model.named_modules())
        macs = None if example is None else _count_macs(model, candidates, example)
        # Whether they can be pruned or not: the layer before a tied classifier is none.
        convs = [n for n, m in names.items() if isinstance(m, _CONVS)]
        linears = [n for n, m in names.items() if isinstance(m, nn.Linear)]
        default = {**{n: _FIRST for n in convs[:1]}, **{n: _LAST for n in linears[-1:]}}
        layers: list[LayerPlan] = []
        skipped: dict[str, str] = {}
        used: set[int] = set()
        for name in {**candidates, **kinds}:
            at = next((i for i, r in enumerate(self.rules) if fnmatchcase(name, r.match)), None)
            if at is None:
                skipped[name] = kinds.get(name) or default.get(name) or "no rule matches"
                continue
            used.add(at)
            rule = self.rules[at]
            if rule.skip is not None:
                skipped[name] = rule.skip
            elif name in kinds:
                if rule.exact:
                    raise PlanError(f"Plan: layer {name!r} got {kinds[name]}, wanted a convolution or linear layer")
                skipped[name] = kinds[name]
            elif name in default and not rule.exact:
                skipped[name] = default[name]
            else:
                layers.append(_resolve_layer(name, candidates[name], rule, None if macs is None else macs[name]))
        for i, rule in enumerate(self.rules):
            if i not in used:
                raise PlanError(_unused(rule, self.rules[:i], names, [*candidates, *kinds]))
        if not layers:
            why = "; ".join(f"{n}: {w}" for n, w in list(skipped.items())[:4])
            raise PlanError(f"Plan: rules got no layer to prune, wanted at least one ({why})")
        chosen = {la.name for la in layers}
        rest = [n for n in candidates if n not in chosen]
        return ResolvedPlan(
            tuple(layers),
            skipped,
            sum(candidates[n].weight.numel() for n in rest),
            None if macs is None else sum(macs[n] for n in rest),
        )


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _only(table: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    unknown = [k for k in table if k not in allowed]
    if unknown:
        raise PlanError(f"{where}: key got {unknown[0]!r}, wanted one of {', '.join(allowed)}")


def _spec(table: Mapping[str, Any], where: str) -> Spec:
    for key in ("structure", "rate"):
        if key not in table:
            raise PlanError(f"{where}: {key} got nothing, wanted a value")
    rate = table["rate"]
    if isinstance(rate, Sequence) and not isinstance(rate, str):
        rate = tuple(rate)
    block = table.get("block", DEFAULT_BLOCK)
    if "block" in table and table["structure"] != "block_column":
        raise PlanError(
            f"{where}: block got {block!r} for structure {table['structure']!r}, wanted it for block_column only"
        )
    return Spec(table["structure"], rate, block)


def _spec_dict(c: Spec) -> dict[str, Any]:
    d: dict[str, Any] = {"structure": c.structure, "rate": list(c.rate) if isinstance(c.rate, tuple) else c.rate}
    return d | {"block": c.block} if c.structure == "block_column" else d


def _rule(table: Mapping[str, Any], i: int) -> Rule:
    where = f"plan.rule[{i}]" + (f" ({table['match']!r})" if "match" in table else "")
    _only(table, ("match", "structure", "rate", "block", "constraints", "skip", "rho"), where)
    if not isinstance(table.get("match"), str):
        raise PlanError(f"{where}: match got {table.get('match')!r}, wanted a name pattern")
    forms = [k for k in ("structure", "constraints", "skip") if k in table]
    if len(forms) != 1:
        raise PlanError(f"{where}: got {' and '.join(forms) or 'nothing'}, wanted one of structure, constraints, skip")
    extra = [k for k in ("rate", "block", "rho") if k in table]
    if forms == ["skip"] and extra or forms == ["constraints"] and extra not in ([], ["rho"]):
        raise PlanError(f"{where}: key got {extra[0]!r} beside {forms[0]}, wanted it left out")
    specs: tuple[Spec, ...] = ()
    if forms == ["structure"]:
        specs = (_spec(table, where),)
    elif forms == ["constraints"]:
        if not isinstance(table["constraints"], Sequence) or not table["constraints"]:
            raise PlanError(f"{where}: constraints got {table['constraints']!r}, wanted a list of tables")
        for c in table["constraints"]:
            if not isinstance(c, Mapping):
                raise PlanError(f"{where}: constraints got {c!r}, wanted tables with structure and rate")
            _only(c, ("structure", "rate", "block"), f"{where}: constraints")
        specs = tuple(_spec(c, where) for c in table["constraints"])
    return Rule(table["match"], specs, table.get("skip"), table.get("rho"))


def _check_rule(rule: Rule) -> None:
    where = f"Plan: rule {rule.match!r}"
    if rule.skip is not None:
        if not isinstance(rule.skip, str) or not rule.skip:
            raise PlanError(f"{where}: skip got {rule.skip!r}, wanted the reason, as text")
        if rule.constraints:
            raise PlanError(f"{where}: got skip and constraints, wanted one of them")
    elif not rule.constraints:
        raise PlanError(f"{where}: got nothing, wanted constraints or skip")
    for c in rule.constraints:
        if c.structure not in STRUCTURES:
            raise PlanError(f"{where}: structure got {c.structure!r}, wanted one of {', '.join(STRUCTURES)}")
        rates = c.rate if isinstance(c.rate, tuple) else (c.rate,)
        if not rates or not all(_is_number(r) and 0 <= r < 1 for r in rates):
            wanted = "a share of groups to remove in [0, 1), or a tuple of them, one per round"
            raise PlanError(f"{where}: rate got {c.rate!r}, wanted {wanted}")
        if any(b < a for a, b in pairwise(rates)):
            raise PlanError(f"{where}: rate got {c.rate!r}, wanted rates that do not fall from round to round")
        if not isinstance(c.block, int) or isinstance(c.block, bool) or c.block < 1:
            raise PlanError(f"{where}: block got {c.block!r}, wanted a whole number of at least 1")
    kinds = [c.structure for c in rule.constraints]
    if len(kinds) > 3 or len(set(kinds)) != len(kinds):
        raise PlanError(f"{where}: constraints got {kinds}, wanted at most three, of different structures")
    if rule.rho is not None and not (_is_number(rule.rho) and 0 < rule.rho < math.inf):
        raise PlanError(f"{where}: rho got {rule.rho!r}, wanted a positive number")


def _candidates(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """(layers that can be pruned, layers that might be expected to be, with the reason why they cannot)."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    good: dict[str, Any] = {}
    bad: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, _PRUNABLE):
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.parameter.UninitializedParameter):
                bad[name] = f"{type(module).__name__} that is not initialised yet"
            elif not isinstance(weight, nn.Parameter):
                bad[name] = f"{type(module).__name__} whose weight is computed (parametrised), not a Parameter"
            elif owners[id(weight)][0] != name:
                bad[name] = f"{type(module).__name__} that shares its weight with {owners[id(weight)][0]!r}"
            else:
                good[name] = module
        elif isinstance(module, _UNSUPPORTED):
            bad[name] = f"{type(module).__name__}, which is not supported"
    return good, bad


def _resolve_layer(name: str, module: Any, rule: Rule, macs: int | None) -> LayerPlan:
    shape, conv_groups = tuple(module.weight.shape), getattr(module, "groups", 1)
    constraints = []
    for c in rule.constraints:
        assert not isinstance(c.rate, tuple)
        n = n_groups(c.structure, shape, conv_groups, c.block)
        # The guard lets 0.29 of 100 be 29, though 0.29 * 100 is 28.999999999999996.
        keep = n - math.floor(c.rate * n + 1e-6)
        if keep < 1:
            raise PlanError(
                f"Plan: layer {name!r}: rate got {c.rate}, wanted one that leaves some of its {n} {c.structure} groups"
            )
        constraints.append(Constraint(c.structure, c.rate, c.block, keep))
    return LayerPlan(name, shape, conv_groups, tuple(constraints), rule.rho, macs)


def _unused(rule: Rule, former: Sequence[Rule], modules: Mapping[str, nn.Module], layers: Sequence[str]) -> str:
    taken = [n for n in layers if fnmatchcase(n, rule.match)]
    if taken:
        by = next(r.match for r in former if fnmatchcase(taken[0], r.match))
        return f"Plan: rule {rule.match!r} got no layer, as {by!r} before it takes {taken[0]!r}, wanted it further up"
    other = [n for n in modules if n and fnmatchcase(n, rule.match)]
    if other:
        kind = type(modules[other[0]]).__name__
        return f"Plan: rule {rule.match!r} got {kind} ({other[0]!r}), wanted a convolution or linear layer"
    known = ", ".join(list(layers)[:12]) + (", ..." if len(layers) > 12 else "")
    return f"Plan: rule {rule.match!r} got no layer, wanted a pattern that matches one of {known}"


def _count_macs(model: nn.Module, layers: Mapping[str, Any], example: Tensor | tuple[Any, ...]) -> dict[str, int]:
    """Dense multiply-adds per example of each layer, over all its calls in one forward pass in eval mode."""
    try:
        rows = layer_table(model, example)
    except Exception as e:
        raise PlanError(
            f"Plan.resolve: example got {type(e).__name__}: {e}; wanted one that {type(model).__name__} takes"
        ) from e
    counted = {row.name: row.macs for row in rows}
    return {name: counted.get(name, 0) for name in layers}
