"""Recipes, the stages of a run, interruption and resumption, and the run command."""

import dataclasses
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import structadmm
from structadmm import data, models, pipeline
from structadmm.cli import app
from structadmm.errors import Error
from structadmm.pipeline import Interrupted, Recipe, RecipeError, Run, Watcher

TINY = """
name = "tiny"
threads = 1
[data]
name = "digits"
batch = 128
shift = 1
rotate = 5.0
[model]
name = "digits-resnet"
args = { stem = 8, width = 8, deep = 16 }
[train]
epochs = 2
lr = 1e-2
[plan]
steps = [0.5, 1.0]
[[plan.rule]]
match = "block?.conv1"
constraints = [{ structure = "filter", rate = 0.5 }, { structure = "column", rate = 0.5 }]
[[plan.rule]]
match = "block?.conv2"
structure = "column"
rate = 0.75
[admm]
epochs = 2
lr = 1e-2
distill = 0.5
rho = { schedule = "ramp", start = 0.1, end = 1.0 }
[retrain]
epochs = 3
between = 1
lr = 1e-2
optimizer = "sgd"
distill = 0.5
label_smoothing = 0.1
[measure]
batches = [1, 5]
repeats = 2
"""
EPOCHS = 2 + 2 + 1 + 2 + 3


def tiny(**tables: Mapping[str, Any]) -> Recipe:
    """The recipe above, with fields of some tables replaced."""
    doc = _toml(TINY)
    for name, fields in tables.items():
        doc[name] = {**doc[name], **fields}
    return Recipe.from_dict(doc)


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


class StopAt(Watcher):
    """Ctrl-C at the end of the n-th epoch that it sees (before that epoch's checkpoint)."""

    def __init__(self, n: int) -> None:
        self.left = n

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run of the tiny recipe: folder and result."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, Run(tiny(), folder, seed=1).execute()


def _final(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def _assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, masks, generators, residuals and accuracies."""
    one, two = _final(a), _final(b)
    assert one["finished"] and two["finished"]
    for key in ("model", "teacher", "masks"):
        assert one[key].keys() == two[key].keys()
        for name in one[key]:
            assert torch.equal(one[key][name], two[key][name]), f"{key} {name}"
    assert torch.equal(one["rng"], two["rng"])
    assert torch.equal(one["batches"]["generator"], two["batches"]["generator"])
    assert one["history"] == two["history"] and one["iterations"] == two["iterations"]
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


# Recipes


@pytest.mark.parametrize("name", sorted(pipeline.built_in_recipes()))
def test_built_in_recipes_fit_their_models(name: str) -> None:
    recipe = pipeline.load_recipe(name)
    assert recipe.name == name
    model = models.build(recipe.model.name, recipe.model.args)
    plan = recipe.plan.resolve(model)
    assert plan.totals()["weights_removed"] > 0.5  # type: ignore[operator]
    kinds = [s.kind for s in pipeline.stages(recipe)]
    assert kinds == ["train"] + ["admm", "retrain"] * recipe.plan.n_steps


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[train]", "[trian]", "key got 'trian', wanted one of"),
        ("epochs = 2", "epoch = 2", "train got the key 'epoch', wanted one of epochs"),
        ("epochs = 2", "epochs = 2.5", "train.epochs got 2.5, wanted a whole number"),
        ("epochs = 2", "epochs = true", "train.epochs got True, wanted a whole number"),
        ("epochs = 2", "epochs = -1", "train.epochs got -1, wanted at least 0"),
        ("lr = 1e-2", "lr = 0.0", "train.lr got 0.0, wanted a positive number"),
        ('optimizer = "sgd"', 'optimizer = "lamb"', "retrain.optimizer got 'lamb', wanted one of adamw"),
        ("distill = 0.5", "distill = 2", "admm.distill got 2, wanted a share"),
        ('schedule = "ramp"', 'schedule = "jump"', "admm.rho.schedule got 'jump', wanted one of ramp"),
        ("end = 1.0", "finish = 1.0", "admm.rho got .*'finish'"),
        ('name = "digits"', "", "data.name got nothing, wanted text"),
        ("batches = [1, 5]", 'batches = ["one"]', r"measure.batches got \['one'\]"),
        ("batches = [1, 5]", "batches = [0]", r"measure.batches got \[0\], wanted"),
        ('name = "tiny"', 'name = "a/b"', "name got 'a/b'"),
        ("threads = 1", "threads = 0", "threads got 0, wanted at least 1"),
        ("rate = 0.75", "rate = 1.5", "rate"),
        ("[plan]\nsteps", "[admm]\nsteps", "TOML"),
    ],
)
def test_a_bad_recipe_names_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TINY
    path = tmp_path / "bad.toml"
    path.write_text(TINY.replace(old, new, 1))
    with pytest.raises(Error, match=message):
        pipeline.load_recipe(path)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="wanted one of digits, .* or the path of a .toml file"):
        pipeline.load_recipe("digit")


def test_lr_warms_up_and_falls_to_a_hundredth() -> None:
    table = pipeline.Training(epochs=10, lr=1.0, warmup=2.0)
    rates = [pipeline._lr(table, 10, at / 10) for at in range(101)]
    assert rates[0] == pytest.approx(0.05) and rates[20] == pytest.approx(1.0) and rates[100] == pytest.approx(0.01)
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)


def test_reestimated_batchnorm_is_the_average_over_the_batches() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).eval()
    batches = [(torch.randn(8, 1, 6, 6), torch.zeros(8)) for _ in range(4)]
    pipeline.reestimate_batchnorm(net, batches)
    conv, norm = net[0], net[1]
    means = torch.stack([conv(x).mean((0, 2, 3)) for x, _ in batches]).mean(0)
    # Rounding of sums of a hundred f32 terms of size one.
    torch.testing.assert_close(norm.running_mean, means.detach(), rtol=1e-5, atol=1e-6)
    assert norm.momentum == 0.1 and not net.training


def test_the_distilled_loss_has_its_minimum_at_the_teacher() -> None:
    table = pipeline.Training(distill=1.0, temperature=3.0)
    teacher = torch.randn(5, 4)
    y = torch.zeros(5, dtype=torch.long)
    assert float(pipeline._loss(teacher.clone(), y, table, teacher)) == pytest.approx(0.0, abs=1e-6)
    assert float(pipeline._loss(torch.randn(5, 4), y, table, teacher)) > 0.01


def test_costs_of_the_digits_net() -> None:
    # By hand: 3x3 convs 1->16, 16->32, 32->32 on 64 pixels, 32->80, 80->80 on 16; 1x1 16->32 on 64, 32->80 on 16.
    weights = 144 + 4608 + 9216 + 512 + 23040 + 57600 + 2560
    macs = 64 * (144 + 4608 + 9216 + 512) + 16 * (23040 + 57600 + 2560) + 800
    assert weights <= 100_000
    assert pipeline.conv_cost(models.build("digits-resnet").eval(), torch.zeros(1, 1, 8, 8)) == (weights, macs)


# A run


def test_a_run_ends_with_everything(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, r = finished
    assert json.loads((folder / "result.json").read_text()) == r
    assert [h["stage"] for h in r["history"]].count("retrain-2") == 3 and len(r["history"]) == EPOCHS
    assert len(r["iterations"]) == 4 and r["iterations"][1]["rho"] == pytest.approx(1.0)
    assert r["compact_difference"] <= pipeline.TOLERANCE and r["reload_difference"] <= pipeline.TOLERANCE
    assert r["conv_weights_ratio"] == r["dense"]["conv_weights"] / r["pruned"]["conv_weights"] > 2
    assert set(r["speed_up"]) == {"1", "5"}
    net = structadmm.load(folder / "model.safetensors")
    dataset = data.load("digits")
    accuracy, _ = pipeline.evaluate(net, dataset.test)
    assert accuracy == r["pruned"]["test_accuracy"]
    assert accuracy > 0.2  # ten classes, and the net was trained
    dense = structadmm.load(folder / "dense.safetensors")
    assert pipeline.evaluate(dense, dataset.test)[0] == r["dense"]["test_accuracy"]


def test_masked_weights_stayed_zero(finished: tuple[Path, dict[str, Any]]) -> None:
    state = _final(finished[0])
    for name, mask in state["masks"].items():
        assert not state["model"][f"{name}.weight"][~mask].any()
        assert mask.float().mean() <= 0.5


def test_test_images_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run with other test images and labels gives the same network."""
    load = data.load
    recipe = tiny(train={"epochs": 1}, admm={"epochs": 1}, retrain={"epochs": 1})
    Run(recipe, tmp_path / "a").execute()

    def swapped(*args: Any, **kwargs: Any) -> data.Dataset:
        found = load(*args, **kwargs)
        x = found.test.x.flip(3)  # type: ignore[attr-defined]
        return dataclasses.replace(found, test=[(x.float(), torch.zeros(len(x), dtype=torch.long))])

    monkeypatch.setattr(data, "load", swapped)
    Run(recipe, tmp_path / "b").execute()
    one, two = _final(tmp_path / "a"), _final(tmp_path / "b")
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    a, b = (structadmm.load(tmp_path / k / "model.safetensors").state_dict() for k in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_ones_own_model_and_loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_run_module.py").write_text(
        "import torch\nfrom torch import nn\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        "def loaders():\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    make = lambda: TensorDataset(torch.randn(48, 3, 6, 6, generator=g), torch.arange(48) % 3)\n"
        "    return tuple(DataLoader(make(), 16, shuffle=s) for s in (True, False, False))\n"
        "def net(width):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3),\n"
        "                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {
        "threads": 1,
        "data": {"name": "own_run_module:loaders"},
        "model": {"name": "own_run_module:net", "args": {"width": 8}},
        "train": {"epochs": 1},
        "plan": {"rule": [{"match": "2", "structure": "column", "rate": 0.5}]},
        "admm": {"epochs": 1},
        "retrain": {"epochs": 2},
        "measure": {"batches": [1], "repeats": 1},
    }
    recipe = Recipe.from_dict(own)
    result = Run(recipe, tmp_path / "a", checkpoint_every=0).execute()
    assert result["pruned"]["conv_weights"] < result["dense"]["conv_weights"]
    # A DataLoader draws its order from torch's own generator, whose state is in the checkpoint.
    with pytest.raises(Interrupted):
        Run(recipe, tmp_path / "b", checkpoint_every=0, watcher=StopAt(4)).execute()
    Run(recipe, tmp_path / "b", resume=True).execute()
    one, two = _final(tmp_path / "a"), _final(tmp_path / "b")
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])


def test_a_run_from_trained_weights(tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    folder, before = finished
    start = {"epochs": 0, "weights": str(folder / "dense.safetensors")}
    quick = {"epochs": 1}
    state = torch.get_rng_state()
    result = Run(tiny(train=start, admm=quick, retrain=quick), tmp_path / "out").execute()
    assert torch.equal(torch.get_rng_state(), state), "a run leaves torch's generator as it was"
    for key in ("test_accuracy", "conv_weights"):
        assert result["dense"][key] == before["dense"][key]
    with pytest.raises(RecipeError, match="train.weights"):
        Run(tiny(train={"weights": "absent.pt"}), tmp_path / "other").execute()
    assert not (tmp_path / "other").exists(), "nothing half-made"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    recipe = tiny(train={"optimizer": "sgd", "lr": 1e30, "epochs": 2})
    with pytest.raises(Error, match="wanted a finite number: lower train.lr|not finite|NaN"):
        Run(recipe, tmp_path).execute()
    assert not (tmp_path / "result.json").exists()


# Interrupted and resumed


@pytest.mark.parametrize("case", range(2))
def test_interrupted_at_a_random_epoch_it_resumes_bit_for_bit(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]], case: int
) -> None:
    seed = random.randrange(10**6)
    stops = sorted(random.Random(seed).sample(range(1, EPOCHS + 1), 2))
    print(f"seed {seed}: Ctrl-C in epochs {stops}")
    # The second stop counts the epochs of the resumed run, which begins with the one that was lost.
    for n, resume in ((stops[0], False), (stops[1] - stops[0] + 1, True)):
        with pytest.raises(Interrupted, match="go on with --resume"):
            run = Run(tiny(), tmp_path, 1, resume=resume, watcher=StopAt(n), checkpoint_every=0)
            run.execute()
    result = Run(tiny(), tmp_path, seed=1, resume=True).execute()
    _assert_same_run(finished[0], tmp_path)
    assert result["pruned"]["test_accuracy"] == finished[1]["pruned"]["test_accuracy"]


def test_killed_at_a_random_moment_it_resumes_bit_for_bit(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY)
    out = tmp_path / "out"
    main = "from structadmm.cli import main; main()"
    command = [sys.executable, "-c", main, "run", str(recipe), "--seed", "1", "--out", str(out), "--json"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "checkpoint.pt").exists()
    Run(tiny(), out, seed=1, resume=True).execute()
    _assert_same_run(finished[0], out)


def test_a_finished_run_resumes_to_its_result(finished: tuple[Path, dict[str, Any]]) -> None:
    assert Run(tiny(), finished[0], seed=1, resume=True, watcher=StopAt(1)).execute() == finished[1]


def test_what_may_not_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Run(tiny(), tmp_path, watcher=StopAt(1)).execute()
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(RecipeError, match="unfinished run; go on with --resume or start over with --restart"):
        Run(tiny(), tmp_path).execute()
    for other in (Run(tiny(), tmp_path, seed=5, resume=True), Run(tiny(train={"lr": 0.5}), tmp_path, resume=True)):
        with pytest.raises(RecipeError, match="checkpoint of another recipe or seed"):
            other.execute()
    assert (tmp_path / "checkpoint.pt").read_bytes() == whole, "a refused run must leave the checkpoint alone"
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecipeError, match="damaged checkpoint"):
        Run(tiny(), tmp_path, resume=True).execute()
    with pytest.raises(Interrupted):
        Run(tiny(), tmp_path, restart=True, watcher=StopAt(2)).execute()


# The command


def test_run_command_with_json_prints_nothing_else(tmp_path: Path) -> None:
    recipe = tmp_path / "quick.toml"
    quick = TINY.replace("epochs = 2", "epochs = 1").replace("epochs = 3", "epochs = 1").replace("between = 1", "")
    recipe.write_text(quick.replace("steps = [0.5, 1.0]", ""))
    done = CliRunner().invoke(app, ["run", str(recipe), "--seeds", "0,2", "--out", str(tmp_path / "o"), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert not done.stderr
    assert result["summary"]["seeds"] == [0, 2] and [r["seed"] for r in result["runs"]] == [0, 2]
    lost = [r["accuracy_lost"] for r in result["runs"]]
    assert result["summary"]["accuracy_lost"] == {"mean": sum(lost) / 2, "min": min(lost), "max": max(lost)}
    assert Path(result["report"]).is_file()
    assert (tmp_path / "o/tiny-seed2/report.html").is_file() and (tmp_path / "o/tiny-seeds0-2.json").is_file()
    again = CliRunner().invoke(app, ["run", str(recipe), "--seeds", "0,2", "--out", str(tmp_path / "o"), "--resume"])
    assert again.exit_code == 0 and "mean of seeds 0, 2" in again.stdout and "conv weights" in again.stdout


def test_ctrl_c_says_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY)
    monkeypatch.setattr(Watcher, "epoch", StopAt(2).epoch)
    done = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path / "o"), "--json"])
    assert done.exit_code == 130 and "--resume" in done.stderr and not done.stdout


def test_run_command_errors_are_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (["absent"], "wanted one of digits"),
        (["digits", "--seeds", "0;1"], "--seeds"),
        (["lenet5-mnist", "--out", str(tmp_path / "o")], "--data FOLDER"),
    ):
        done = CliRunner().invoke(app, ["run", *arguments])
        assert done.exit_code == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


# The other networks


@pytest.mark.parametrize(
    ("name", "args", "shape", "weights"),
    [
        # Conv weights by hand: 20*25 + 50*20*25; the tables of He et al.; option B adds two 1x1 convs.
        ("lenet5", {}, (2, 1, 28, 28), 25_500),
        ("cifar-resnet", {"depth": 20}, (2, 3, 32, 32), 432 + 6 * 2304 + 4608 + 5 * 9216 + 18432 + 5 * 36864),
        (
            "cifar-resnet",
            {"depth": 14, "shortcut": "B"},
            (2, 3, 32, 32),
            432 + 4 * 2304 + 4608 + 3 * 9216 + 18432 + 3 * 36864 + 2560,
        ),
        ("resnet18", {"width": 16}, (2, 3, 32, 32), None),
    ],
)
def test_networks(name: str, args: dict[str, Any], shape: tuple[int, ...], weights: int | None) -> None:
    net = models.build(name, args).eval()
    assert net(torch.zeros(shape)).shape == (shape[0], 10)
    if weights is not None:
        assert pipeline.conv_cost(net, torch.zeros(1, *shape[1:]))[0] == weights


def test_bad_networks_are_named() -> None:
    with pytest.raises(Error, match="model.name: got 'vgg', wanted one of digits-resnet"):
        models.build("vgg")
    with pytest.raises(Error, match="model.args: got .*'depht'"):
        models.build("cifar-resnet", {"depht": 20})
    with pytest.raises(Error, match="depth got 21, wanted 6n"):
        models.build("cifar-resnet", {"depth": 21})


def test_trained_resnet20_weights_load(data_dir: Path) -> None:
    import importlib.util

    net = models.build("cifar-resnet", {"depth": 20, "shortcut": "A"})
    (path,) = (data_dir / "weights/resnet_cifar10").glob("resnet20-*.th")
    pipeline.load_weights(net, path)
    spec = importlib.util.spec_from_file_location("load_cifar10", data_dir / "cifar10/load_cifar10.py")
    assert spec and spec.loader
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    x, y = (torch.from_numpy(t[:500]) for t in theirs.load_batch("test_batch"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (x.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    accuracy, _ = pipeline.evaluate(net, [(images, y)])
    assert accuracy > 0.88  # 91.73 % on all 10,000; the standard deviation for 500 images is 1.2 points
    with pytest.raises(RecipeError, match="train.weights got .*does not fit"):
        pipeline.load_weights(models.build("lenet5"), path)
    with pytest.raises(RecipeError, match="train.weights got 'absent.pt', wanted an existing file"):
        pipeline.load_weights(net, "absent.pt")


def test_lenet5_on_a_little_of_mnist(data_dir: Path, tmp_path: Path) -> None:
    for stem, dims in (("images-idx3", 3), ("labels-idx1", 1)):
        for kind, n in (("train", 1500), ("t10k", 200)):
            values = data.read_idx(data_dir / "mnist", f"{kind}-{stem}-ubyte", dims)[:n]
            head = struct.pack(f">{dims + 1}I", 0x0800 + dims, *values.shape)
            (tmp_path / f"{kind}-{stem}-ubyte").write_bytes(head + values.numpy().tobytes())
    recipe = pipeline.load_recipe("lenet5-mnist")
    short = {
        key: dataclasses.replace(getattr(recipe, key), epochs=2) for key in ("train", "admm", "retrain")
    } | {"measure": pipeline.MeasureTable([1], 1)}  # fmt: skip
    recipe = dataclasses.replace(recipe, **short, data=dataclasses.replace(recipe.data, folder=str(tmp_path)))
    result = Run(recipe, tmp_path / "out", threads=1).execute()
    assert result["conv_weights_ratio"] > 8 and result["pruned"]["test_accuracy"] > 0.5
