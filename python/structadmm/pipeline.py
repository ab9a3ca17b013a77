"""The main job, driven by a TOML recipe: a network is trained or loaded, pruned by ADMM in rounds, retrained with the
zeros held, purified, freed of unused paths, compacted, verified, saved, reloaded and measured.

Stages: train, then per round of the plan admm-i and retrain-i, then finish. Everything that a stage needs to go on is
in one checkpoint (weights, optimizer, Z and U, masks, generators, history), written whole or not at all, so a run that
was interrupted or killed continues bit for bit. Every choice is made on the validation split; the test images are
looked at once, when all is done.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import platform
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data as data_module
from . import models
from .admm import ADMM, Masks
from .artefact import load, save
from .compact import compact
from .data import Dataset
from .errors import Error
from .files import atomic_torch_save, atomic_write_text
from .paths import remove_unused_paths
from .plan import Plan
from .purify import purify
from .report import write_report
from .schedules import Constant, MultiStage, Ramp, ResidualBalancing, Schedule
from .timing import interleave

TOLERANCE = 1e-4
"""Largest difference allowed between the outputs of the masked and the compacted network: float32 sums in another
order, logits of order 10.
"""


class RecipeError(Error, ValueError):
    """A recipe that cannot be read or carried out; names the key."""


class Interrupted(Error):
    """The run was stopped by Ctrl-C; the message says how to resume."""


# The recipe


@dataclass(frozen=True)
class DataTable:
    name: str
    folder: str | None = None
    batch: int = 64
    val: float = 0.2
    shift: int = 0
    flip: bool = False
    rotate: float = 0.0
    zoom: float = 0.0
    split: int = data_module.SPLIT_SEED
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelTable:
    name: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """epochs of an optimizer whose lr rises over `warmup` epochs and falls by a cosine. distill: weight of the dense
    teacher's softened outputs in the loss (Hinton et al., 2015), at `temperature`.
    """

    epochs: int = 0
    optimizer: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 1e-4
    warmup: float = 1.0
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 2.0


@dataclass(frozen=True)
class TrainTable(Training):
    """weights: a state_dict to start from (.safetensors, or a torch file read without running code); epochs may then be
    0.
    """

    weights: str | None = None


@dataclass(frozen=True)
class AdmmTable(Training):
    """epochs: of one round; every: epochs between two ADMM iterations. rho: a number, or a table with `schedule` (ramp,
    multistage, balancing) and the arguments of that class in schedules.py.
    """

    every: int = 1
    rho: float | dict[str, Any] = 1e-3


@dataclass(frozen=True)
class RetrainTable(Training):
    """between: epochs after the rounds before the last."""

    between: int | None = None


@dataclass(frozen=True)
class PurifyTable:
    """budget: by how much the mean cross entropy on the validation split may rise; on a small split it says more than
    the accuracy, which moves in whole images.
    """

    enabled: bool = True
    budget: float = 0.001


@dataclass(frozen=True)
class MeasureTable:
    batches: list[int] = field(default_factory=lambda: [1, 64])
    repeats: int = 15


@dataclass(frozen=True)
class Recipe:
    """A run, as a TOML file states it. threads: None is torch's own choice."""

    name: str
    data: DataTable
    model: ModelTable
    train: TrainTable
    plan: Plan
    admm: AdmmTable
    retrain: RetrainTable
    purify: PurifyTable = PurifyTable()
    measure: MeasureTable = MeasureTable()
    threads: int | None = None

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], name: str = "recipe") -> Recipe:
        """A recipe from the plain values of a TOML file. Raises RecipeError or PlanError naming the key."""
        tables = {f.name: f for f in dataclasses.fields(cls)}
        for key in table:
            if key not in tables:
                raise RecipeError(f"recipe: key got {key!r}, wanted one of {', '.join(tables)}")
        made: dict[str, Any] = {"name": table.get("name", name)}
        if not isinstance(made["name"], str) or not made["name"] or "/" in made["name"]:
            raise RecipeError(f"recipe: name got {made['name']!r}, wanted a text without '/'")
        threads = made["threads"] = table.get("threads")
        if not _is(threads, int | None) or threads is not None and threads < 1:
            raise RecipeError(f"recipe: threads got {threads!r}, wanted at least 1")
        for key, kind in _TABLES.items():
            made[key] = _table(kind, table.get(key, {}), key)
        if not isinstance(table.get("plan"), Mapping):
            raise RecipeError("recipe: plan got nothing, wanted a table [plan] with [[plan.rule]] in it")
        recipe = cls(plan=Plan.from_dict(table["plan"]), **made)
        _schedule(recipe.admm, 1)
        return recipe

    def to_dict(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def signature(self) -> str:
        """What a checkpoint must agree with to be resumed: everything but the place of the data."""
        table = self.to_dict()
        del table["data"]["folder"]
        return json.dumps(table, sort_keys=True)


_TABLES: dict[str, type] = {
    "data": DataTable,
    "model": ModelTable,
    "train": TrainTable,
    "admm": AdmmTable,
    "retrain": RetrainTable,
    "purify": PurifyTable,
    "measure": MeasureTable,
}


def _plain(value: Any) -> Any:
    if isinstance(value, Plan):
        return value.to_dict()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _is(value: Any, kind: Any) -> bool:
    """Whether a TOML value fits an annotation; whole numbers serve as floats, booleans never as numbers."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, k) for k in typing.get_args(kind))
    if origin is list:
        return isinstance(value, list) and all(_is(v, typing.get_args(kind)[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_RANGES: dict[str, tuple[float, float, str]] = {
    "batch": (1, math.inf, "at least 1"),
    "val": (1e-9, 1 - 1e-9, "a share between 0 and 1"),
    "shift": (0, math.inf, "at least 0"),
    "epochs": (0, math.inf, "at least 0"),
    "between": (0, math.inf, "at least 0"),
    "rotate": (0, 180, "degrees, 0 to 180"),
    "zoom": (0, 0.9, "a share from 0 to 0.9"),
    "every": (1, math.inf, "at least 1"),
    "lr": (1e-12, math.inf, "a positive number"),
    "weight_decay": (0, math.inf, "at least 0"),
    "warmup": (0, math.inf, "at least 0"),
    "label_smoothing": (0, 1 - 1e-9, "a share in [0, 1)"),
    "distill": (0, 1, "a share in [0, 1]"),
    "temperature": (1e-9, math.inf, "a positive number"),
    "budget": (0, math.inf, "at least 0"),
    "repeats": (1, math.inf, "at least 1"),
}


def _table(kind: type, table: Any, where: str) -> Any:
    if not isinstance(table, Mapping):
        raise RecipeError(f"recipe: {where} got {table!r}, wanted a table [{where}]")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            raise RecipeError(f"recipe: {where} got the key {key!r}, wanted one of {', '.join(fields)}")
        if not _is(value, hints[key]):
            raise RecipeError(f"recipe: {where}.{key} got {value!r}, wanted {_WORDS.get(hints[key], fields[key].type)}")
        if key in _RANGES and value is not None:
            low, high, words = _RANGES[key]
            if not low <= value <= high:
                raise RecipeError(f"recipe: {where}.{key} got {value!r}, wanted {words}")
        if key == "batches" and not (value and min(value) >= 1):
            raise RecipeError(f"recipe: {where}.batches got {value!r}, wanted sizes of at least 1")
        if key == "optimizer" and value not in _OPTIMIZERS:
            raise RecipeError(f"recipe: {where}.optimizer got {value!r}, wanted one of {', '.join(_OPTIMIZERS)}")
    for key, f in fields.items():
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and key not in table:
            raise RecipeError(f"recipe: {where}.{key} got nothing, wanted {_WORDS.get(hints[key], 'a value')}")
    return kind(**table)


def built_in_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {p.stem: p for p in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}


def load_recipe(recipe: str | os.PathLike[str]) -> Recipe:
    """A built-in recipe by name, or a recipe file by path. Raises RecipeError naming what was wanted."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    known = built_in_recipes()
    path = known.get(str(recipe), Path(recipe))
    if not path.is_file():
        raise RecipeError(f"recipe: got {str(recipe)!r}, wanted one of {', '.join(known)} or the path of a .toml file")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise RecipeError(f"recipe: {path} is not valid TOML: {e}") from None
    return Recipe.from_dict(table, path.stem)


def _schedule(table: AdmmTable, iterations: int) -> Schedule:
    """The rho schedule of one round of so many ADMM iterations."""
    if not isinstance(table.rho, dict):
        return Constant(float(table.rho))
    kinds: dict[str, Callable[..., Schedule]] = {"ramp": Ramp, "multistage": MultiStage, "balancing": ResidualBalancing}
    args = dict(table.rho)
    kind = args.pop("schedule", None)
    if kind not in kinds:
        raise RecipeError(f"recipe: admm.rho.schedule got {kind!r}, wanted one of {', '.join(kinds)}")
    if kind == "ramp":
        # The last iteration of the round already runs at the final rho.
        args.setdefault("iterations", max(1, iterations - 1))
    try:
        return kinds[kind](**args)
    except TypeError as e:
        raise RecipeError(
            f"recipe: admm.rho got {sorted(args)}, which {kinds[kind].__name__} does not take: {e}"
        ) from None


# Training


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr),
    "adam": lambda groups, lr: torch.optim.Adam(groups, lr),
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True),
}


def _optimizer(model: nn.Module, table: Training) -> torch.optim.Optimizer:
    # Weight decay is for weights; on BatchNorm scales and biases it only fights the normalisation.
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": table.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return _OPTIMIZERS[table.optimizer]([g for g in groups if g["params"]], table.lr)


def _lr(table: Training, epochs: int, at: float) -> float:
    """Linear warm-up, then a cosine down to 1 % of lr; `at` in epochs."""
    warmup = min(table.warmup, epochs / 4)
    if at < warmup:
        return table.lr * (0.05 + 0.95 * at / warmup)
    t = (at - warmup) / max(epochs - warmup, 1e-9)
    return table.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(t, 1.0))))


def _loss(out: Tensor, y: Tensor, table: Training, teacher: Tensor | None) -> Tensor:
    loss = F.cross_entropy(out, y, label_smoothing=table.label_smoothing)
    if teacher is None:
        return loss
    t = table.temperature
    soft = F.kl_div(F.log_softmax(out / t, 1), F.log_softmax(teacher / t, 1), log_target=True, reduction="batchmean")
    return (1 - table.distill) * loss + table.distill * t * t * soft


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """(share of images classified rightly, mean cross entropy) in eval mode; the mode is put back."""
    training = model.training
    model.eval()
    right = n = 0
    loss = 0.0
    for x, y in batches:
        out = model(x)
        right += int((out.argmax(1) == y).sum())
        loss += float(F.cross_entropy(out, y, reduction="sum"))
        n += len(y)
    model.train(training)
    return right / max(n, 1), loss / max(n, 1)


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], passes: int = 1) -> None:
    """Running means and variances of every BatchNorm anew, as plain averages over the training batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    training = model.training
    model.train()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    for _ in range(passes):
        for x, _y in batches:
            model(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    model.train(training)


# The run


class Watcher:
    """Told what a run does; this one is silent. Subclass it to show progress."""

    def start(self, total_epochs: int, done: int) -> None: ...
    def stage(self, name: str, epochs: int, done: int) -> None: ...
    def epoch(self, row: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...
    def end(self) -> None: ...


@dataclass
class Run:
    """One seed of a recipe, with its output folder.

    `execute()` returns the result as plain values, which are also written to folder/result.json beside
    model.safetensors (the pruned network), dense.safetensors (the dense weights) and checkpoint.pt. Raises Interrupted
    on Ctrl-C; RecipeError when the folder holds an unfinished run and resume is False, or a run of another recipe and
    resume is True. checkpoint_every: seconds between two checkpoints at epoch ends; stage ends always have one.
    """

    recipe: Recipe
    folder: Path
    seed: int = 0
    resume: bool = False
    restart: bool = False
    threads: int | None = None
    watcher: Watcher = field(default_factory=Watcher)
    checkpoint_every: float = 1.0

    def execute(self) -> dict[str, Any]:
        before = torch.get_num_threads()
        try:
            with torch.random.fork_rng(devices=[]):
                return self._execute()
        except KeyboardInterrupt:
            raise Interrupted(
                f"run: interrupted; {self.folder} holds a checkpoint, go on with --resume"
                if self._checkpoint_path.is_file()
                else "run: interrupted before the first checkpoint"
            ) from None
        finally:
            self.watcher.end()
            torch.set_num_threads(before)

    @property
    def _checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def _result_path(self) -> Path:
        return self.folder / "result.json"

    def _execute(self) -> dict[str, Any]:
        state = self._found()
        if state is not None and state["finished"]:
            return dict(json.loads(self._result_path.read_text(encoding="utf-8")))
        threads = self.threads or (state["threads"] if state else self.recipe.threads) or torch.get_num_threads()
        if state is not None and threads != state["threads"]:
            self.watcher.note(f"threads {threads}, formerly {state['threads']}: sums may differ in their last bits")
        torch.set_num_threads(threads)
        r = self.recipe
        torch.manual_seed(self.seed)
        d = r.data
        dataset = data_module.load(seed=self.seed, **dataclasses.asdict(d))
        model = models.build(r.model.name, r.model.args)
        plan = r.plan.resolve(model, dataset.example)
        if state is None and r.train.weights:
            load_weights(model, r.train.weights)
            self.watcher.note(f"weights from {r.train.weights}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.watcher.note(f"{r.name}, seed {self.seed}, in {self.folder}")
        job = _Job(self, dataset, model, threads)
        job.plan_text = str(plan)
        if state is None:
            self._result_path.unlink(missing_ok=True)
            job.checkpoint()
        else:
            job.load(state)
        return job.execute()

    def _found(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, if that is asked for and there is one."""
        path = self._checkpoint_path
        if not path.is_file() or self.restart:
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            recipe, seed, finished = state["recipe"], state["seed"], state["finished"]
        except Exception as e:  # torch raises many kinds for a damaged file
            raise RecipeError(
                f"run: {path} got a damaged checkpoint ({e}), wanted a whole one; start over with --restart"
            ) from None
        if not self.resume:
            if finished:
                return None
            raise RecipeError(
                f"run: {self.folder} holds an unfinished run; go on with --resume or start over with --restart"
            )
        if recipe != self.recipe.signature() or seed != self.seed:
            raise RecipeError(
                f"run: {self.folder} got a checkpoint of another recipe or seed, wanted this one's; start over with "
                f"--restart"
            )
        if finished and not self._result_path.is_file():
            raise RecipeError(
                f"run: {self.folder} got no result.json beside a finished checkpoint; start over with --restart"
            )
        return state


def run_recipe(
    recipe: str | os.PathLike[str] | Recipe,
    seeds: Sequence[int] = (0,),
    out: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    resume: bool = False,
    restart: bool = False,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Run a recipe once per seed and write the reports.

    out: the run's folder, runs/NAME-seedK if not given; with several seeds the folder that holds those. folder: where
    the data lies, instead of the recipe's. Returns {"runs": each result, "summary": see `summarise`, "report": path of
    the HTML page}. Raises what Run.execute raises.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise RecipeError(f"run: seeds got {list(seeds)}, wanted at least one, each once")
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if folder is not None:
        chosen = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, folder=os.fspath(folder)))
    base = Path(out) if out is not None else Path("runs")
    results, page = [], base / "report.html"
    for seed in seeds:
        here = base if out is not None and len(seeds) == 1 else base / f"{chosen.name}-seed{seed}"
        run = Run(chosen, here, seed, resume, restart, threads, watcher or Watcher())
        results.append(run.execute())
        page = here / "report.html"
        write_report([results[-1]], page)
    summary = summarise(results)
    if len(seeds) > 1:
        stem = f"{chosen.name}-seeds{'-'.join(map(str, seeds))}"
        page = base / f"{stem}.html"
        write_report(results, page)
        text = json.dumps({"summary": summary, "runs": results}, indent=1)
        atomic_write_text(base / f"{stem}.json", text)
    return {"runs": results, "summary": summary, "report": str(page)}


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state_dict: a .safetensors file, or a torch file (weights only), maybe under the key "state_dict" and with
    "module." before its names.
    """
    where = "recipe: train.weights"
    if not Path(path).is_file():
        raise RecipeError(f"{where} got {os.fspath(path)!r}, wanted an existing file")
    try:
        if os.fspath(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            state: dict[str, Tensor] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)  # type: ignore[assignment]
    except Exception as e:
        raise RecipeError(f"{where} got {os.fspath(path)!r}, which cannot be read: {e}") from None
    state = {k.removeprefix("module."): v for k, v in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise RecipeError(f"{where} got {os.fspath(path)!r}, which does not fit the model: {e}") from None


@dataclass(frozen=True)
class _Stage:
    name: str
    kind: str
    round: int
    epochs: int
    table: Training


def stages(recipe: Recipe) -> list[_Stage]:
    """The training stages of a recipe, in order."""
    found = [_Stage("train", "train", -1, recipe.train.epochs, recipe.train)]
    last = recipe.plan.n_steps - 1
    for i in range(last + 1):
        again = recipe.retrain.epochs
        if i < last and recipe.retrain.between is not None:
            again = recipe.retrain.between
        found.append(_Stage(f"admm-{i + 1}", "admm", i, recipe.admm.epochs, recipe.admm))
        found.append(_Stage(f"retrain-{i + 1}", "retrain", i, again, recipe.retrain))
    return found


class _Job:
    """The state of a run between two epochs, and how it goes on."""

    def __init__(self, run: Run, dataset: Dataset, model: nn.Module, threads: int) -> None:
        self.run, self.recipe, self.dataset, self.model, self.threads = run, run.recipe, dataset, model, threads
        self.stages = stages(run.recipe)
        self.stage_index = 0
        self.epoch = 0  # epochs done in this stage
        self.optimizer: torch.optim.Optimizer | None = None
        self.admm: ADMM | None = None
        self.masks: Masks | None = None
        self.teacher: nn.Module | None = None
        self.history: list[dict[str, Any]] = []
        self.iterations: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.finished = False
        self.plan_text = ""
        self._since = time.perf_counter()
        self._saved_at = -math.inf

    # Checkpoints

    def checkpoint(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        train = self.dataset.train
        state = {
            "version": 1,
            "recipe": self.recipe.signature(),
            "seed": self.run.seed,
            "threads": self.threads,
            "stage": self.stage_index,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "teacher": self.teacher.state_dict() if self.teacher else None,
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "admm": self.admm.state_dict() if self.admm else None,
            "masks": self.masks.state_dict() if self.masks else None,
            "rng": torch.get_rng_state(),
            "batches": train.state_dict() if hasattr(train, "state_dict") else None,
            "history": self.history,
            "iterations": self.iterations,
            "seconds": self.seconds,
            "finished": self.finished,
        }
        atomic_torch_save(state, self.run._checkpoint_path)
        self._saved_at = now

    def load(self, state: Mapping[str, Any]) -> None:
        if state["teacher"] is not None:
            self.teacher = _frozen(self.model)
            self.teacher.load_state_dict(state["teacher"])
        self.model.load_state_dict(state["model"])
        self.stage_index, self.epoch = state["stage"], state["epoch"]
        if state["masks"] is not None:
            self.masks = Masks(self.model, state["masks"])
        self.history, self.iterations, self.seconds = state["history"], state["iterations"], state["seconds"]
        if self.epoch:
            self._begin(self.stages[self.stage_index])
            assert self.optimizer is not None
            self.optimizer.load_state_dict(state["optimizer"])
            if self.admm is not None:
                self.admm.load_state_dict(state["admm"])
        if state["batches"] is not None:
            self.dataset.train.load_state_dict(state["batches"])
        torch.set_rng_state(state["rng"])

    # Stages

    def execute(self) -> dict[str, Any]:
        watcher = self.run.watcher
        total = sum(s.epochs for s in self.stages)
        watcher.start(total, sum(s.epochs for s in self.stages[: self.stage_index]) + self.epoch)
        while self.stage_index < len(self.stages):
            stage = self.stages[self.stage_index]
            watcher.stage(stage.name, stage.epochs, self.epoch)
            if self.epoch == 0:
                self._begin(stage)
            while self.epoch < stage.epochs:
                row = self._epoch(stage)
                self.epoch += 1
                watcher.epoch(row)
                if self.epoch < stage.epochs and time.perf_counter() - self._saved_at >= self.run.checkpoint_every:
                    self.checkpoint()
            self._end(stage)
            self.stage_index, self.epoch = self.stage_index + 1, 0
            self.checkpoint()
        watcher.stage("finish", 0, 0)
        result = self._finish()
        atomic_write_text(self.run._result_path, json.dumps(result, indent=1))
        self.finished = True
        self.checkpoint()
        return result

    def _begin(self, stage: _Stage) -> None:
        self.optimizer = _optimizer(self.model, stage.table)
        if stage.kind == "admm":
            rho = _schedule(self.recipe.admm, self.recipe.admm.epochs // self.recipe.admm.every)
            self.admm = ADMM(self.model, self.recipe.plan.at_step(stage.round), rho, masks=self.masks)
        if self.masks is not None:
            self.masks.hold(self.optimizer)

    def _end(self, stage: _Stage) -> None:
        if stage.kind == "train":
            self.teacher = _frozen(self.model)
        elif stage.kind == "admm":
            assert self.admm is not None
            self.masks = self._without_unused_paths(self.admm.harden_())
            reestimate_batchnorm(self.model, self.dataset.train)
        self.optimizer = self.admm = None

    def _without_unused_paths(self, masks: Masks) -> Masks:
        """Masks that also leave out the weights that no path from input to output passes through, so that the next
        round does not spend its budget on them.

        Only the zeros are taken over: what a removed filter emitted as a constant, retraining makes up for.
        """
        zeros = Masks.from_zeros(remove_unused_paths(_frozen(self.model), self.dataset.example))
        return Masks(self.model, {name: mask & zeros.get(name, mask) for name, mask in masks.items()}).apply_()

    def _epoch(self, stage: _Stage) -> dict[str, Any]:
        table, train = stage.table, self.dataset.train
        assert self.optimizer is not None
        teacher = self.teacher if table.distill else None
        self.model.train()
        steps = len(train)
        total = torch.zeros(())
        for i, (x, y) in enumerate(train):
            lr = _lr(table, stage.epochs, self.epoch + i / steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.zero_grad()
            softened = None
            if teacher is not None:
                with torch.no_grad():
                    softened = teacher(x)
            loss = _loss(self.model(x), y, table, softened)
            loss.backward()
            if self.admm is not None:
                self.admm.add_penalty_grad_()
            self.optimizer.step()
            total += loss.detach()
        if not bool(torch.isfinite(total)):
            raise RecipeError(
                f"run: loss in stage {stage.name}, epoch {self.epoch + 1} got {float(total)}, wanted a finite number: "
                f"lower {stage.kind}.lr"
            )
        if self.admm is not None and (self.epoch + 1) % self.recipe.admm.every == 0:
            step = self.admm.step()
            self.iterations.append(
                {
                    "round": stage.round + 1,
                    "iteration": step.iteration,
                    "rho": step.rho,
                    "primal": step.primal,
                    "dual": step.dual,
                    "eps_primal": step.eps_primal,
                    "eps_dual": step.eps_dual,
                    "relative": {name: layer.relative for name, layer in step.layers.items()},
                }
            )
        accuracy, val_loss = evaluate(self.model, self.dataset.val)
        row = {
            "stage": stage.name,
            "epoch": self.epoch + 1,
            "loss": float(total) / max(steps, 1),
            "val_accuracy": accuracy,
            "val_loss": val_loss,
        }
        self.history.append(row)
        return row

    # What comes after the training

    def _finish(self) -> dict[str, Any]:
        recipe, dataset, folder, note = self.recipe, self.dataset, self.run.folder, self.run.watcher.note
        dense, example = self.teacher, dataset.example
        assert dense is not None
        model = _frozen(self.model)
        steps: list[dict[str, Any]] = []

        def seen(what: str, m: nn.Module) -> None:
            accuracy, _ = evaluate(m, dataset.val)
            weights = sum(int(torch.count_nonzero(w)) for w in conv_weights(m))
            steps.append({"step": what, "val_accuracy": accuracy, "conv_weights": weights})
            note(f"{what}: {weights:,} conv weights, validation accuracy {accuracy:.2%}")

        seen("dense", dense)
        seen("pruned and retrained", model)
        if recipe.purify.enabled:
            model = self._purify(model)
            seen("purified", model)
        model = remove_unused_paths(model, example)
        seen("unused paths removed", model)
        small = compact(model, example)
        difference = largest_difference(model, small, dataset)
        if not difference <= TOLERANCE:
            raise Error(
                f"run: the compacted network differs from the masked one by {difference:.3g}, wanted at most "
                f"{TOLERANCE:g}"
            )
        note(
            f"compacted: outputs equal those of the masked network within {difference:.1e} on all validation and test "
            f"images"
        )

        files = {"pruned": "model.safetensors", "dense": "dense.safetensors"}
        save(small, folder / files["pruned"], example=example, original=dense, metadata=self._card())
        save(dense, folder / files["dense"], example=example, metadata=self._card())
        fast = load(folder / files["pruned"]).eval()
        reloaded = largest_difference(small, fast, dataset)
        if not reloaded <= TOLERANCE:
            raise Error(
                f"run: the reloaded network differs from the saved one by {reloaded:.3g}, wanted at most {TOLERANCE:g}"
            )
        note(f"saved, reloaded: outputs within {reloaded:.1e}")

        before, after = conv_cost(dense, example), conv_cost(fast, example)
        nets: dict[str, nn.Module] = {"dense": dense, "pruned": fast}
        rows: dict[str, dict[str, Any]] = {}
        for (which, net), (weights, macs) in zip(nets.items(), (before, after), strict=True):
            rows[which] = {
                "test_accuracy": evaluate(net, dataset.test)[0],
                "val_accuracy": evaluate(net, dataset.val)[0],
                "conv_weights": weights,
                "multiply_adds": macs,
                "file_bytes": (folder / files[which]).stat().st_size,
                "latency_seconds": {},
            }
        speed_up = {}
        for batch in recipe.measure.batches:
            note(f"measuring the latency at batch {batch}, both networks in turns")
            x = first_images(dataset, batch)
            with torch.inference_mode():
                timings = interleave({w: _call(net, x) for w, net in nets.items()}, repeats=recipe.measure.repeats)
            for which in nets:
                rows[which]["latency_seconds"][str(batch)] = timings[which].to_dict()
            speed_up[str(batch)] = timings.ratio("dense", "pruned").to_dict()
        now = time.perf_counter()
        return {
            "recipe": recipe.name,
            "seed": self.run.seed,
            "dataset": dataset.description,
            **rows,
            "accuracy_lost": rows["dense"]["test_accuracy"] - rows["pruned"]["test_accuracy"],
            "conv_weights_ratio": before[0] / max(after[0], 1),
            "multiply_adds_ratio": before[1] / max(after[1], 1),
            "file_ratio": rows["dense"]["file_bytes"] / rows["pruned"]["file_bytes"],
            "speed_up": speed_up,
            "compact_difference": difference,
            "reload_difference": reloaded,
            "steps": steps,
            "layers": layer_rows(dense, model),
            "compact": str(small.report),
            "plan": self.plan_text,
            "history": self.history,
            "iterations": self.iterations,
            "stages": [{"name": s.name, "epochs": s.epochs} for s in self.stages],
            "seconds": self.seconds + now - self._since,
            "environment": environment(self.threads),
            "settings": recipe.to_dict(),
        }

    def _card(self) -> dict[str, Any]:
        return {"recipe": self.recipe.name, "seed": self.run.seed, "dataset": self.dataset.description}

    def _purify(self, model: nn.Module) -> nn.Module:
        def score(m: nn.Module) -> float:
            return -evaluate(m, self.dataset.val)[1]

        return purify(model, self.dataset.example, score, self.recipe.purify.budget)


def _frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def _call(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: net(x)


def conv_weights(model: nn.Module) -> list[Tensor]:
    """The stored weights of every 2-d convolution, compacted ones included."""
    kinds = ("Conv2d", "CompactConv2d")
    return [w for m in model.modules() if type(m).__name__ in kinds and isinstance(w := m.weight, Tensor)]


@torch.no_grad()
def conv_cost(model: nn.Module, example: Tensor) -> tuple[int, int]:
    """(stored conv weights, multiply-adds of all conv and linear layers for one image).

    Every stored weight is used once per output position; linear layers have one position.
    """
    macs = 0

    def count(module: nn.Module, _x: Any, out: Tensor) -> None:
        nonlocal macs
        assert isinstance(module.weight, Tensor)
        macs += module.weight.numel() * math.prod(out.shape[2:])

    kinds = ("Conv2d", "CompactConv2d", "Linear", "CompactLinear")
    handles = [m.register_forward_hook(count) for m in model.modules() if type(m).__name__ in kinds]
    model(example)
    for h in handles:
        h.remove()
    return sum(w.numel() for w in conv_weights(model)), macs


def layer_rows(dense: nn.Module, zeroed: nn.Module) -> list[dict[str, Any]]:
    """Per conv and linear layer the kept filters, columns and weights, counted from the zeros."""
    rows = []
    for name, m in zeroed.named_modules():
        if not isinstance(m, (nn.Conv2d, nn.Linear)):
            continue
        alive = m.weight.detach().flatten(1) != 0
        rows.append(
            {
                "name": name,
                "shape": list(m.weight.shape),
                "conv": isinstance(m, nn.Conv2d),
                "filters": alive.shape[0],
                "filters_kept": int(alive.any(1).sum()),
                "columns": alive.shape[1],
                "columns_kept": int(alive.any(0).sum()),
                "weights": alive.numel(),
                "weights_kept": int(alive.sum()),
            }
        )
    return rows


@torch.no_grad()
def largest_difference(a: nn.Module, b: nn.Module, dataset: Dataset) -> float:
    """Largest absolute difference of the outputs over all validation and test images (labels unseen)."""
    worst = 0.0
    for batches in (dataset.val, dataset.test):
        for x, _ in batches:
            difference = float((a(x) - b(x)).abs().max())
            worst = difference if not difference <= worst else worst  # NaN is the worst of all
    return worst


def first_images(dataset: Dataset, n: int) -> Tensor:
    """n validation images, repeated where there are fewer."""
    parts: list[Tensor] = []
    while sum(len(p) for p in parts) < n:
        parts += [x for x, _ in dataset.val]
    return torch.cat(parts)[:n].contiguous()


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    from . import __version__, ops

    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "structadmm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": ops.isa(),
    }


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, smallest and largest over the seeds of what the recipe promises."""

    def spread(*path: str) -> dict[str, float]:
        values = []
        for value in results:
            for key in path:
                value = value[key]
            values.append(float(value))  # type: ignore[arg-type]
        return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}

    plain = ("accuracy_lost", "conv_weights_ratio", "multiply_adds_ratio", "file_ratio", "seconds")
    return {
        "seeds": [r["seed"] for r in results],
        "dense_test_accuracy": spread("dense", "test_accuracy"),
        "pruned_test_accuracy": spread("pruned", "test_accuracy"),
        **{key: spread(key) for key in plain},
        **{f"speed_up_batch_{b}": spread("speed_up", b, "median") for b in results[0]["speed_up"]},
    }
