"""The command line: structadmm run | inspect | compact | bench.

Results go to stdout (with --json: one JSON object and nothing else), progress and errors to stderr. Exit status:
0 done, 1 an error (one line; the traceback with --debug), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import pickle
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from . import __version__
from .errors import ArtefactError, Error

if TYPE_CHECKING:
    import torch
    from torch import Tensor, fx, nn

F = TypeVar("F", bound=Callable[..., Any])

app = typer.Typer(
    name="structadmm",
    help="ADMM-regularised structured pruning: train, prune, compact, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_state = {"debug": False}


class CommandError(Error):
    """An argument of a command that cannot be used."""


def _stdout() -> Console:
    """The terminal at its width; a file or pipe with room for whole tables."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


@contextmanager
def _status(text: str) -> Iterator[None]:
    """A spinner on a terminal, nothing in a log."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def one_line_errors(command: F) -> F:
    """Errors of a command as one line on stderr and exit status 1; with --debug as they are."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            print("structadmm: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except typer.Exit:
            raise
        except Exception as e:
            if _state["debug"]:
                raise
            kind = "" if isinstance(e, Error) else f"{type(e).__name__}: "
            text = " ".join(str(e).split())
            print(f"structadmm: {kind}{text or 'no message'}", file=sys.stderr)
            if not isinstance(e, Error):
                print("structadmm: structadmm --debug COMMAND shows where", file=sys.stderr)
            # A command may turn Ctrl-C into an error that says how to go on.
            raise typer.Exit(130 if isinstance(e.__context__, KeyboardInterrupt) else 1) from None

    return wrapped  # type: ignore[return-value]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _version(value: bool) -> None:
    if value:
        print(f"structadmm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    _state["debug"] = debug


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]


# Arguments.


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function that `package.module:function` or `path/to/file.py:function` names. Raises CommandError."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise CommandError(f"{what}: got {spec}, wanted package.module:function or path/to/file.py:function")
    try:
        if place.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules[Path(place).stem] = module  # dataclasses and pickling look a class's module up there
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except (ImportError, OSError, SyntaxError) as e:
        raise CommandError(f"{what}: got {spec}, wanted a module that can be imported: {e}") from e
    function = getattr(module, name, None)
    if not callable(function):
        have = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise CommandError(f"{what}: got {spec}, wanted a function of {place}: it has {have or 'none'}")
    return function


def _make_model(spec: str, what: str) -> nn.Module:
    from torch import nn

    if ":" in spec:
        model = load_function(spec, what)()
    else:
        from .models import build

        model = build(spec)
    if not isinstance(model, nn.Module):
        raise CommandError(f"{what}: {spec} returned {type(model).__name__}, wanted a torch.nn.Module")
    return model


def _dtype(network: nn.Module) -> torch.dtype:
    """Of its first floating parameter."""
    import torch

    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def _example(shapes: list[str], dtype: torch.dtype) -> tuple[Tensor, ...]:
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = []
    for text in shapes:
        sizes = text.lower().split("x")
        if not all(s.isdecimal() and int(s) > 0 for s in sizes):
            raise CommandError(f"--example: got {text}, wanted sizes like 1x3x32x32, the batch first")
        tensors.append(torch.randn([int(s) for s in sizes], generator=generator).to(dtype))
    return tuple(tensors)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict (torch.save, read with weights_only=True, or safetensors). Raises CommandError."""
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CommandError(f"--weights: {path}: got no file, wanted a state_dict or a safetensors file") from None
    except Exception as e:
        # Torch's own text says how to unpickle the file all the same: no advice for a file that is not trusted.
        pickled = isinstance(e, pickle.UnpicklingError)
        why = "a file that is no pickle of tensors alone" if pickled else (str(e).splitlines() or [""])[0]
        raise CommandError(f"--weights: {path}: got {why}, wanted a state_dict or a safetensors file") from e
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CommandError(f"--weights: {path}: got {type(state).__name__}, wanted a dictionary of tensors")
    if state and all(k.startswith("module.") for k in state):  # saved from DataParallel
        state = {k.removeprefix("module."): v for k, v in state.items()}
    own = model.state_dict()
    both = [(k, list(state[k].shape), list(v.shape)) for k, v in own.items() if k in state]
    wrong = [f"{k} {got} in place of {wanted}" for k, got, wanted in both if got != wanted]
    wrong += [f"no {k}" for k in own if k not in state] + [f"{k}, which the model lacks" for k in state if k not in own]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise CommandError(f"--weights: {path}: got {shown}, wanted the tensors and shapes of {type(model).__name__}")
    model.load_state_dict(state)


# Commands.


@app.command()
@one_line_errors
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file (TOML), or the name of one that is shipped.")] = "digits",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights, batches and augmentation.")] = 0,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Several seeds, such as 0,1,2: one run each, then mean and spread.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of the data's original files, instead of the recipe's.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the run: checkpoint, networks, result, report. [default: runs/...]"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=1024, help="Threads; without it, torch's own choice.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in that folder.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start over, whatever the folder holds.")] = False,
    as_json: Json = False,
) -> None:
    """Train or load a network, prune it, retrain it, purify it, compact it, save it, measure it.

    Ctrl-C leaves a checkpoint, from which --resume goes on bit for bit. Recipes that are shipped: digits,
    lenet5-mnist, resnet20-cifar10.
    """
    from .pipeline import Interrupted, Watcher, run_recipe
    from .progress import Bars, result_table

    try:
        chosen = [seed] if seeds is None else [int(s) for s in seeds.split(",")]
    except ValueError:
        raise CommandError(f"--seeds: got {seeds}, wanted whole numbers with commas between them") from None
    sys.path.insert(0, os.getcwd())  # a recipe's module:function may lie beside where the command is given
    try:
        result = run_recipe(recipe, chosen, out, data, threads, resume, restart, Watcher() if as_json else Bars())
    except Interrupted as e:
        print(f"structadmm: {e}", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        _print_json(result)
        return
    console = _stdout()
    console.print(result_table(result))
    print(f"report: {result['report']}")
    print(f"result, networks: {Path(result['report']).parent}")


@app.command()
@one_line_errors
def inspect(
    file: Annotated[Path, typer.Argument(help="An artefact, as structadmm compact and structadmm run write it.")],
    as_json: Json = False,
) -> None:
    """Show the layers of an artefact: shapes, structure, kept groups, weights, multiply-adds."""
    with _status(f"Reading {file}"):
        result = describe(file)
    if as_json:
        _print_json(result)
        return
    console = _stdout()
    title = f"{file.name}: {result['name']}, {result['dtype']}, {result['file_bytes']:,} bytes"
    table = Table(title=title, show_footer=True, box=SIMPLE)
    total = result["total"]
    table.add_column("layer", footer="all")
    table.add_column("kind")
    table.add_column("shape")
    table.add_column("of")
    table.add_column("structure")
    table.add_column("kept groups", justify="right")
    table.add_column("weights", justify="right", footer=f"{total['weights']:,}")
    table.add_column("density", justify="right", footer=f"{total['density']:.2%}")
    table.add_column("multiply-adds", justify="right", footer=f"{total['macs']:,}")
    for row in result["layers"]:
        structure = row["structure"] if row["blocks"] is None else f"{row['structure']}, {row['blocks']} blocks"
        shape, was = ("x".join(map(str, row[k])) for k in ("shape", "dense_shape"))
        table.add_row(
            row["name"],
            row["kind"],
            shape,
            was if was != shape else "",
            structure,
            f"{row['kept']:,} of {row['of']:,}",
            f"{row['weights']:,}",
            f"{row['weights'] / row['dense_weights']:.2%}",
            f"{row['macs']:,}",
        )
    console.print(table)
    shapes = ", ".join("x".join("N" if s is None else str(s) for s in i["shape"]) for i in result["inputs"])
    console.print(f"input {shapes}; {total['parameters']:,} parameters in all; multiply-adds are for one sample")
    if total["dense_weights"] != total["weights"]:
        console.print(
            f"dense original: {total['dense_weights']:,} weights ({total['dense_weights'] / total['weights']:.1f}x)"
            + (
                f", {total['dense_macs']:,} multiply-adds ({total['dense_macs'] / total['macs']:.1f}x)"
                if total["dense_macs"]
                else ""
            )
        )


def describe(file: Path) -> dict[str, Any]:
    """What `inspect` shows, as JSON values. Raises ArtefactError."""
    from .artefact import load
    from .layers import layer_table
    from .manifest import rebuild

    network = load(file, optimized=False)
    about = network.meta["structadmm"]
    dtype = _dtype(network)
    original = rebuild(about["original"]).to(dtype) if about["original"] is not None else None
    example = _inputs("inspect", file, network, 1)
    rows = layer_table(network, example, original)
    dense_rows = layer_table(original, example) if original is not None else []
    weights, dense = (
        sum(r.weights for r in rows),
        sum(r.weights for r in dense_rows) or sum(r.dense_weights for r in rows),
    )
    return {
        "file": str(file),
        "file_bytes": file.stat().st_size,
        "producer": about["producer"],
        "name": type(network).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "inputs": [{"shape": list(s), "dtype": str(d).removeprefix("torch.")} for s, d in about["inputs"]],
        "layers": [r.to_dict() for r in rows],
        "total": {
            "weights": weights,
            "dense_weights": dense,
            "density": weights / dense if dense else 1.0,
            "macs": sum(r.macs for r in rows),
            "dense_macs": sum(r.macs for r in dense_rows) or None,
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        "metadata": about["metadata"],
    }


def _inputs(command: str, file: Path, network: fx.GraphModule, batch: int) -> tuple[Tensor, ...]:
    """Random inputs of the shapes that the artefact notes. Raises ArtefactError."""
    import torch

    inputs = network.meta["structadmm"]["inputs"]
    if inputs is None:
        raise ArtefactError(
            f"{command}: {file}: inputs got none, wanted the input shapes: save(..., example=x) notes them"
        )
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape, dtype in inputs:
        sizes = [batch, *shape[1:]]
        if (count := functools.reduce(lambda a, b: a * b, sizes, 1)) > 2**30:
            raise ArtefactError(f"{command}: {file}: input got {count} values, wanted at most 2^30")
        made.append(
            torch.randn(sizes, generator=generator).to(dtype)
            if dtype.is_floating_point
            else torch.zeros(sizes, dtype=dtype)
        )
    return tuple(made)


@app.command()
@one_line_errors
def compact(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The function that makes the network: package.module:function or path/to/file.py:function; "
            "or the name of a network that is shipped.",
        ),
    ],
    example: Annotated[
        list[str],
        typer.Option("--example", help="Shape of a floating input, batch first, like 1x3x32x32; once for each input."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The artefact to write.")],
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", help="A state_dict (read without unpickling code) or safetensors file with the zeros in it."
        ),
    ] = None,
    columns: Annotated[
        str, typer.Option("--columns", help="Which layers get the compacted kernel: auto, always, never.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Turn a network with zeros in it into a smaller one that computes the same.

    Removes unused paths, cuts filters and channels, compacts columns, verifies the result on a probe batch, and
    writes a file that loads without the network's class.
    """
    from .artefact import save
    from .compact import compact as compact_network
    from .paths import remove_unused_paths

    if not out.parent.is_dir():
        raise CommandError(f"--out: got {out}, wanted a file in a folder that exists")
    network = _make_model(model, "MODEL").eval()
    inputs = _example(example, _dtype(network))
    if weights is not None:
        load_weights(network, weights)
    with _status("Removing unused paths"):
        cleaned = remove_unused_paths(network, inputs)
    with _status("Compacting"):
        small = compact_network(cleaned, inputs, columns=columns)
    report: Any = small.report
    save(small, out, example=inputs, original=network)
    if as_json:
        _print_json({"file": str(out), "file_bytes": out.stat().st_size, "report": report.to_dict()})
    else:
        print(f"{str(report).rstrip()}\nwrote {out}, {out.stat().st_size:,} bytes")


@app.command()
@one_line_errors
def bench(
    file: Annotated[Path, typer.Argument(help="An artefact.")],
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Batch size, once for each.", show_default="1 and 64")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=1024, help="Threads; without it, torch's own choice.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Rounds in which all forms take turns.")] = 15,
    min_time: Annotated[float, typer.Option("--min-time", min=0.0, help="Least seconds of one measurement.")] = 0.05,
    dense: Annotated[
        str | None,
        typer.Option("--dense", help="A function that makes the dense network; without it, the structure in the file."),
    ] = None,
    budget: Annotated[
        float, typer.Option("--budget", min=0.0, help="Seconds for which `optimize` measures, at each batch size.")
    ] = 10.0,
    as_json: Json = False,
) -> None:
    """Time an artefact against its dense original, in turns within one run.

    The original has the structure that the artefact notes and random weights, on which speed does not depend. It and
    the artefact are timed as torch runs them eagerly, with contiguous and with channels-last tensors; the better of the
    two counts. Optimized is the artefact after `structadmm.optimize`, at each batch size.
    """
    result = measure(file, batch or [1, 64], threads, repeats, min_time, dense, budget)
    if as_json:
        _print_json(result)
        return
    table = Table(title=f"{file.name}, {result['threads']} threads, {result['isa']}", box=SIMPLE)
    for name in ("batch", "dense", "compacted", "speed-up", "quartiles", "optimized", "speed-up", "quartiles"):
        table.add_column(name, justify="right")
    for row in result["batches"]:
        cells = [f"{1e3 * row['dense']['median']:.3f} ms ({row['dense']['form']})"]
        for side, speed_up in (("compacted", "speed_up"), ("optimized", "speed_up_optimized")):
            ratio = row[speed_up]
            cells += [f"{1e3 * row[side]['median']:.3f} ms ({row[side]['form']})", f"{ratio['median']:.2f}x"]
            cells.append(f"{ratio['q1']:.2f} to {ratio['q3']:.2f}")
        table.add_row(str(row["batch"]), *cells)
    _stdout().print(table)


def measure(
    file: Path,
    batches: list[int],
    threads: int | None,
    repeats: int,
    min_time: float,
    dense: str | None,
    budget: float,
) -> dict[str, Any]:
    """What `bench` prints, as JSON values; seconds per batch. Raises ArtefactError, CommandError."""
    import torch

    from .artefact import load
    from .manifest import rebuild
    from .ops import isa
    from .optimize import optimize
    from .timing import interleave

    network = load(file, optimized=False)
    structure = network.meta["structadmm"]["original"]
    if dense is not None:
        original = _make_model(dense, "--dense").eval()
    elif structure is not None:
        original = rebuild(structure)
    else:
        raise ArtefactError(f"bench: {file}: original got none, wanted the dense structure, or --dense module:function")
    dtype = _dtype(network)
    original = original.to(dtype)

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    rows = []
    try:
        for batch in batches:
            x = _inputs("bench", file, network, batch)
            if dense is not None:
                _check_runs(original, x, dense)
            forms = {
                (side, form): _form(module, x, layout)
                for side, module in (("dense", original), ("compacted", network))
                for form, layout in (("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last))
            }
            names = {f"{side}, {form}": call for (side, form), call in forms.items()}
            fast = optimize(network, x, budget=budget, report=False)
            report: Any = fast.report
            names[f"optimized, {report.choice}"] = lambda fast=fast, x=x: fast(*x)  # type: ignore[misc]
            if sys.stderr.isatty():  # a line, not a spinner: its thread would be timed too
                print(f"timing batch {batch}", file=sys.stderr)
            with torch.inference_mode():
                timings = interleave(names, repeats=repeats, min_time=min_time)
            sides = ("dense", "compacted", "optimized")
            best = {side: timings.fastest(*(n for n in names if n.startswith(side))) for side in sides}
            each = timings.to_dict()
            rows.append(
                {
                    "batch": batch,
                    **{side: {"form": name.partition(", ")[2], **each[name]} for side, name in best.items()},
                    "speed_up": timings.ratio(best["dense"], best["compacted"]).to_dict(),
                    "speed_up_optimized": timings.ratio(best["dense"], best["optimized"]).to_dict(),
                    "all": each,
                }
            )
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    return {
        "file": str(file),
        "threads": used,
        "isa": isa(),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "batches": rows,
    }


def _check_runs(module: nn.Module, x: tuple[Tensor, ...], spec: str) -> None:
    import torch

    try:
        with torch.inference_mode():
            module(*x)
    except Exception as e:
        shapes = ", ".join(str(list(t.shape)) for t in x)
        raise CommandError(f"--dense: {spec} got {type(e).__name__}: {e}; wanted a network that takes {shapes}") from e


def _form(module: nn.Module, x: tuple[Tensor, ...], layout: torch.memory_format) -> Callable[[], object]:
    """A call of a copy of the module with weights and inputs in one memory format."""
    import copy

    module = copy.deepcopy(module).to(memory_format=layout)  # type: ignore[call-overload]
    x = tuple(t.to(memory_format=layout) if t.dim() == 4 else t for t in x)
    return lambda: module(*x)


def main() -> None:
    """Entry point of the `structadmm` program."""
    # A program's search path begins with its own folder; the user's modules are in the current one.
    sys.path.insert(0, os.getcwd())
    app()
