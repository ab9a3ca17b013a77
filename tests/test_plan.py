"""Plans: rules against models, recipes, progressive rounds, the table, and every error by name."""

import math

import pytest
import torch
from torch import nn

from structadmm.errors import PlanError
from structadmm.plan import Plan, Rule, Spec


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 20, 3, padding=1), nn.Conv2d(20, 12, 3, groups=2))
        self.up = nn.ConvTranspose2d(12, 6, 2)
        self.mid = nn.Linear(6, 30)
        self.head = nn.Linear(30, 10)

    def forward(self, x):
        x = self.up(self.body(self.stem(x))).mean((2, 3))
        return self.head(self.mid(x))


def plan(*rules, **more):
    return Plan.from_dict({"rule": list(rules), **more})


def column(match="*", rate=0.5, **more):
    return {"match": match, "structure": "column", "rate": rate, **more}


def test_defaults_are_left_alone_with_their_reasons():
    got = Plan.uniform(Small(), "column", 0.9).resolve(Small())
    assert [la.name for la in got] == ["body.1", "body.2", "mid"]
    assert set(got.skipped) == {"stem", "up", "head"}
    assert "first convolution" in got.skipped["stem"] and "classifier" in got.skipped["head"]
    assert "ConvTranspose2d" in got.skipped["up"]


def test_an_exact_name_overrides_the_defaults_and_a_wildcard_does_not():
    got = plan(column("stem"), column("hea?"), column("body.*")).resolve(Small())
    assert [la.name for la in got] == ["stem", "body.1", "body.2"]
    assert "classifier" in got.skipped["head"] and got.skipped["mid"] == "no rule matches"


def test_the_first_rule_that_matches_decides():
    got = plan({"match": "mid", "skip": "small"}, column("body.1", 0.25), column("*", 0.75)).resolve(Small())
    assert got.skipped["mid"] == "small"
    assert got["body.1"].constraints[0].rate == 0.25 and got["body.2"].constraints[0].rate == 0.75


@pytest.mark.parametrize(
    ("structure", "groups"),
    [("filter", 12), ("channel", 20), ("column", 180), ("block_column", 360), ("element", 1080)],
)
def test_keep_is_groups_less_the_floor_of_their_share(structure, groups):
    # body.2 is 12 filters of 10x3x3 in two conv groups; blocks of 4 cut six filters into 4 + 2.
    for rate in (0.0, 0.29, 0.5, 0.9, 0.999):
        (c,) = Plan((Rule("body.2", (Spec(structure, rate, 4),)),)).resolve(Small())["body.2"].constraints
        exact = int(str(rate).replace("0.", "", 1)) if rate else 0
        assert c.keep == groups - groups * exact // 10 ** (len(str(rate)) - 2)


def test_multiply_adds_are_counted_per_example():
    model, example = Small(), torch.randn(3, 3, 10, 10)
    model.train()
    before = model.body[0].running_mean.clone()
    got = Plan.uniform(model, "column", 0.9).resolve(model, example)
    assert model.training and model.body[0].training and torch.equal(before, model.body[0].running_mean)
    assert not any(m._forward_hooks for m in model.modules())
    assert got["body.1"].macs == 20 * 8 * 9 * 100 and got["body.2"].macs == 12 * 10 * 9 * 64 and got["mid"].macs == 180
    t = got.totals()
    dense = 8 * 27 + 20 * 72 + 12 * 90 + 180 + 300
    assert t["weights"] == dense and t["macs"] == 8 * 27 * 100 + 144000 + 69120 + 180 + 300
    # Columns kept: 8 of 72, 18 of 180 over two conv groups, 1 of 6.
    assert t["weights_kept"] == 8 * 27 + 300 + 20 * 8 + 6 * 18 + 30 * 1
    text = str(got)
    assert (
        "body.2" in text and f"{dense:,}" in text and "left alone: head: classifier" in text and "90.0% column" in text
    )


def test_a_layer_called_twice_counts_twice():
    lin = nn.Linear(4, 4)
    model = nn.Sequential(lin, nn.ReLU(), lin, nn.Linear(4, 2))
    assert plan(column("0")).resolve(model, torch.randn(5, 4))["0"].macs == 32


def test_density_of_mixtures():
    got = plan(
        {
            "match": "body.1",
            "constraints": [{"structure": "filter", "rate": 0.5}, {"structure": "column", "rate": 0.75}],
        }
    ).resolve(Small())["body.1"]
    assert got.density == 0.5 * 0.25


def test_progressive_rounds():
    p = plan(column("mid", 0.96), steps=[0.5, 1.0])
    assert p.n_steps == 2
    (first,), (last,) = (p.at_step(i).rules for i in range(2))
    assert math.isclose(first.constraints[0].rate, 0.8) and last.constraints[0].rate == 0.96  # densities 0.2, 0.04
    assert p.at_step(-1) == p.at_step(1) and p.at_step(0).n_steps == 1
    assert p.resolve(Small()) == p.at_step(1).resolve(Small())
    p = plan(column("mid", [0.2, 0.5, 0.5]), column("body.1", 0.5))
    assert p.n_steps == 3 and [p.at_step(i).rules[0].constraints[0].rate for i in range(3)] == [0.2, 0.5, 0.5]
    assert p.at_step(0).rules[1].constraints[0].rate == 0.5
    with pytest.raises(PlanError, match="i got 3, wanted 0 to 2"):
        p.at_step(3)


def test_toml_and_dict_round_trip(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
[train]
epochs = 3
[plan]
steps = [0.25, 1.0]
[[plan.rule]]
match = "body.1"
structure = "block_column"
rate = 0.9
block = 4
rho = 0.002
[[plan.rule]]
match = "body.*"
constraints = [{structure = "filter", rate = 0.5}, {structure = "column", rate = 0.75}]
[[plan.rule]]
match = "*"
skip = "not now"
"""
    )
    p = Plan.from_toml(path)
    assert p.steps == (0.25, 1.0)
    assert p.rules == (
        Rule("body.1", (Spec("block_column", 0.9, 4),), None, 0.002),
        Rule("body.*", (Spec("filter", 0.5), Spec("column", 0.75))),
        Rule("*", (), "not now"),
    )
    assert Plan.from_dict(p.to_dict()) == p
    assert str(p).splitlines() == [
        "body.1: 0.9 of block_column(4) groups",
        "body.*: 0.5 of filter groups + 0.75 of column groups",
        "*: left alone: not now",
        "in 2 rounds",
    ]
    got = p.resolve(Small())
    assert got["body.1"].rho == 0.002 and set(got.skipped.values()) >= {"not now"}


FILTER = {"structure": "filter", "rate": 0.5}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([], "plan: got list, wanted a table"),
        ({"rules": []}, "plan: key got 'rules', wanted one of steps, rule"),
        ({"rule": []}, "rules got none"),
        (
            {"rule": [{"match": "mid", "structure": "column", "ratio": 0.5}]},
            r"\('mid'\): key got 'ratio', wanted one of",
        ),
        ({"rule": [{"structure": "column", "rate": 0.5}]}, "match got None"),
        ({"rule": [{"match": "mid", "structure": "row", "rate": 0.5}]}, "'mid': structure got 'row', wanted one of"),
        ({"rule": [{"match": "mid", "structure": "column"}]}, "'mid'.*rate got nothing"),
        ({"rule": [{"match": "mid"}]}, "'mid'.*wanted one of structure, constraints, skip"),
        (
            {"rule": [{"match": "mid", "structure": "column", "rate": 1.0}]},
            r"'mid': rate got 1.0, wanted .* in \[0, 1\)",
        ),
        ({"rule": [{"match": "mid", "structure": "column", "rate": -0.1}]}, "'mid': rate got -0.1"),
        ({"rule": [{"match": "mid", "structure": "column", "rate": math.nan}]}, "'mid': rate got nan"),
        ({"rule": [{"match": "mid", "structure": "column", "rate": "0.5"}]}, "'mid': rate got '0.5'"),
        ({"rule": [column("mid", [0.5, 0.2])]}, "'mid'.*do not fall"),
        ({"rule": [column("mid", [0.2, 0.5])], "steps": [0.2, 0.5, 1.0]}, "wanted the same number everywhere"),
        ({"rule": [column("mid")], "steps": [0.5, 0.7]}, "steps got .*wanted rising fractions"),
        ({"rule": [column("mid")], "steps": [1.0, 0.5]}, "steps got"),
        ({"rule": [column("mid", block=4)]}, "'mid'.*wanted it for block_column only"),
        ({"rule": [{"match": "mid", "structure": "block_column", "rate": 0.5, "block": 0}]}, "'mid': block got 0"),
        ({"rule": [{"match": "mid", "skip": True}]}, "'mid': skip got True, wanted the reason"),
        ({"rule": [{"match": "mid", "skip": "why", "rate": 0.5}]}, "'mid'.*key got 'rate' beside skip"),
        ({"rule": [{"match": "mid", "constraints": [FILTER, FILTER]}]}, "'mid'.*different structures"),
        ({"rule": [{"match": "mid", "constraints": [{**FILTER, "rho": 1}]}]}, "'mid'.*constraints: key got 'rho'"),
        ({"rule": [{"match": "mid", **FILTER, "rho": 0}]}, "'mid': rho got 0, wanted a positive number"),
    ],
)
def test_bad_tables(table, words):
    with pytest.raises(PlanError, match=words):
        Plan.from_dict(table)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([column("conv*")], "rule 'conv\\*' got no layer, wanted a pattern that matches one of stem, body.1"),
        ([column(), column("mid")], "rule 'mid' got no layer, as '\\*' before it takes 'mid', wanted it further up"),
        ([column("body.0")], "rule 'body.0' got BatchNorm2d"),
        ([column("up")], "layer 'up' got ConvTranspose2d, which is not supported, wanted a convolution or linear"),
        ([column("stem*")], "got no layer to prune, wanted at least one .*stem: first convolution"),
        ([column("mid", 0.9999999)], "layer 'mid': rate got 0.9999999, wanted one that leaves some of its 6 column"),
    ],
)
def test_rules_that_do_not_fit_the_model(rules, words):
    with pytest.raises(PlanError, match=words):
        plan(*rules).resolve(Small())


def test_layers_whose_weight_is_not_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LazyLinear(3))
    model[1].weight = model[0].weight
    torch.nn.utils.parametrizations.weight_norm(model[2])
    got = plan(
        column("*"),
    ).resolve(model)
    assert [la.name for la in got] == ["0", "3"]  # 4 is the classifier, though it cannot be pruned
    assert "shares its weight with '0'" in got.skipped["1"] and "parametrised" in got.skipped["2"]
    assert "not initialised" in got.skipped["4"]
    with pytest.raises(PlanError, match="layer '1' got Linear that shares its weight with '0'"):
        plan(column("1")).resolve(model)


def test_a_tied_classifier_is_still_the_classifier():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False))
    model[3].weight = model[0].weight
    got = Plan.uniform(model, "column", 0.5).resolve(model)
    assert [la.name for la in got] == ["1", "2"] and "shares its weight with '0'" in got.skipped["3"]


def test_an_example_that_the_model_does_not_take_leaves_it_as_it_was():
    model = Small().train()
    model.body[0].eval()  # as with frozen statistics
    with pytest.raises(PlanError, match="example got RuntimeError: .*; wanted one that Small takes"):
        plan(column()).resolve(model, torch.randn(1, 4, 10, 10))
    assert model.training and not model.body[0].training
    assert not any(m._forward_hooks for m in model.modules())


def test_what_is_no_model():
    with pytest.raises(PlanError, match="model got str, wanted a torch.nn.Module"):
        plan(column()).resolve("resnet18")


def test_bad_files(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[plan\n")
    with pytest.raises(PlanError, match=r"recipe.toml got invalid TOML"):
        Plan.from_toml(path)
    path.write_text("[train]\n")
    with pytest.raises(PlanError, match=r"got no table \[plan\]"):
        Plan.from_toml(path)
