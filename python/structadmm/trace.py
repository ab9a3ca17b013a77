"""From a module to a graph of operations with the shape of every value, on a copy of the module.

`trace` copies the model, runs torch.fx over the copy in both modes, makes the graph say what it does (in-place
operations rebound, functional dropout turned into modules that obey train() and eval()), and propagates the shapes of
the example.

Three front ends follow forward, in this order: torch.fx's tracer, one that knows shapes (symbolic.py), torch.export
(exported.py). torch.export follows the most and comes last: where the tracer that knows shapes gets through it says
hardly more, and it costs time. Seconds on one busy core, by torch.fx, with shapes, by torch.export (both modes):
torchvision's resnet152 2.6, 4.8, 10; densenet161 4.7, 7.6, 22; swin_t 2.7, 5.4, 16; maxvit_t 8.3, 15, 29; a decoder of
48 blocks 4.0, 9.6, 16. torch.fx's own graph takes maps of any size, the other two are for the example's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from .copies import clone, own
from .errors import TraceError
from .exported import exported
from .plain import in_plain_terms
from .symbolic import FOLLOWED, VIEWS, Closed, Ghost, Untraceable, culprit, defaults_of, first_line, mode, symbolic
from .unpack import unpack

# Shapes are propagated at this batch size, which no channel count, conv group or head count is likely to equal: a
# reshape that mixes the batch with channels then shows.
PROBE_BATCH = 3

# The batch size of what torch.export runs on, whose guards are about this number: one that no other size equals.
EXPORT_BATCH = 11

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)


@dataclass
class Traced:
    """A traced copy of a model.

    module: GraphModule over a copy of the model, attribute paths as in the model. shapes: per node the shape of its
    value in eval mode at batch `batch` (a tuple of ints for a tensor, nested tuples for several
        tensors, the value itself for numbers).
    inputs: the example, checked. varies: per tensor the dimensions whose size depends on the batch's. notes: what the
    user should know (hooks that do not survive, modes that differ).
    """

    module: fx.GraphModule
    shapes: dict[fx.Node, Any]
    inputs: tuple[Tensor, ...]
    batch: int
    notes: list[str] = field(default_factory=list)
    varies: dict[fx.Node, set[int]] = field(default_factory=dict)


class Shape(tuple[int, ...]):
    """The shape of a tensor, told apart from a tuple that the network computes with."""


def hooked(model: nn.Module) -> list[str]:
    """Names of the modules that carry hooks which a traced copy does not run."""
    found = []
    for name, module in model.named_modules():
        hooks = [h for kind in _HOOKS for h in getattr(module, kind).values()]
        if any(not isinstance(h, (prune.BasePruningMethod, WeightNorm, SpectralNorm)) for h in hooks):
            found.append(name or type(module).__name__)
    return found


def as_inputs(
    model: nn.Module, example: Tensor | Sequence[Tensor], who: str = "trace", argument: str = "example"
) -> tuple[Tensor, ...]:
    """The example as a tuple of tensors, checked against the model's dtype and device; errors call it `argument`.
    Raises TraceError."""
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, (tuple, list)) or not inputs or not all(isinstance(t, Tensor) for t in inputs):
        kind = (
            f"{type(example).__name__}"
            if not isinstance(example, (tuple, list))
            else f"({', '.join(type(t).__name__ for t in example)})"
        )
        raise TraceError(f"{who}: {argument} got {kind}, wanted a tensor or a tuple of tensors")
    named = next(((n, p) for n, p in model.named_parameters() if p.is_floating_point()), None)
    for i, t in enumerate(inputs):
        if named is None:
            break
        name, p = named
        which = argument if len(inputs) == 1 else f"{argument}[{i}]"
        if t.device != p.device:
            raise TraceError(f"{who}: {which} got a tensor on {t.device}, wanted {p.device} as {name}")
        if t.is_floating_point() and t.dtype != p.dtype:
            raise TraceError(f"{who}: {which} got {t.dtype}, wanted {p.dtype} as {name}")
    return tuple(t.detach() for t in inputs)


def rebatch(inputs: Sequence[Tensor], batch: int, seed: int | None = None) -> tuple[Tensor, ...]:
    """The inputs at another batch size: repeated along dimension 0, or with `seed` standard normal values (integers:
    repeated).

    Inputs whose first dimensions differ have no common batch and keep their shapes.
    """
    common = (
        len({t.shape[0] if t.dim() else -1 for t in inputs}) == 1 and inputs[0].dim() > 0 and inputs[0].shape[0] > 0
    )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    out = []
    for t in inputs:
        if common:
            t = t[torch.arange(batch, device=t.device) % t.shape[0]]
        if generator is not None and t.is_floating_point():
            t = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype).to(t.device)
        out.append(t)
    return tuple(out)


def shape_of(value: Any) -> Any:
    """Shapes instead of tensors in a nested value."""
    if isinstance(value, Tensor):
        return Shape(value.shape)
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(shape_of(v) for v in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


class _Shapes(fx.Interpreter):
    """Shapes of all values; of what a ghost's module gives, or by running."""

    def __init__(self, module: fx.GraphModule, ghost: Ghost | None = None) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, Any] = {}
        self.current: fx.Node | None = None
        if ghost is not None:
            self.call_module, self.call_function, self.call_method, self.get_attr = (  # type: ignore[method-assign]
                functools.partial(ghost.call, kind)
                for kind in ("call_module", "call_function", "call_method", "get_attr")
            )

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        out = super().run_node(n)
        self.shapes[n] = shape_of(out)
        return out


def _mutated(node: fx.Node) -> fx.Node | None:
    """The node whose tensor this one overwrites, if any."""
    arg = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if arg is None:
        return None
    target: Any = node.target
    if node.op == "call_method":
        return arg if target.endswith("_") and not target.endswith("__") else None
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(target) if node.graph.owning_module else None
        return arg if getattr(module, "inplace", False) is True else None
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        inplace = node.kwargs.get("inplace") is True or (
            name in _INPLACE_POSITION
            and len(node.args) > _INPLACE_POSITION[name]
            and node.args[_INPLACE_POSITION[name]] is True
        )
        if inplace or node.target in _INPLACE_OPERATORS:
            return arg
        if name.endswith("_") and not name.endswith("__"):
            return arg
    return None


_INPLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
# Position of `inplace` among the arguments of the functional activations.
_INPLACE_POSITION = {
    "relu": 1,
    "relu6": 1,
    "silu": 1,
    "hardswish": 1,
    "hardsigmoid": 1,
    "mish": 1,
    "selu": 1,
    "leaky_relu": 2,
    "elu": 2,
    "celu": 2,
    "hardtanh": 3,
    "dropout": 3,
}


def _rebind_mutated(graph: fx.Graph, who: str) -> None:
    """Users of a tensor that come after it was overwritten use the operation that overwrote it: the same values, but
    said so. Raises TraceError where a view is overwritten whose base is used, which a graph can't say."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        source = _mutated(node)
        if source is not None:
            for user in list(source.users):
                if order[user] > order[node]:
                    user.replace_input_with(source, node)
            kind = source.target if isinstance(source.target, str) else getattr(source.target, "__name__", "")
            if source.op == "call_module" and graph.owning_module is not None:
                kind = type(graph.owning_module.get_submodule(str(source.target))).__name__
            users = [u for base in source.all_input_nodes for u in base.users if order[u] > order[node]]
            later = [u for u in users if u.target not in ("size", "dim", getattr)]
            if kind in VIEWS and later:
                raise Untraceable(
                    who,
                    f"{node.name} got a view ({source.name}) to overwrite while {later[0].name} still uses what it is "
                    "a view of",
                    "an operation that is not in place",
                )


def _unify_modes(module: fx.GraphModule, graph: fx.Graph, training: fx.Graph) -> list[str]:
    """Functional dropout, whose mode tracing froze, becomes modules; other differences between the modes are noted."""
    nodes, others = list(graph.nodes), list(training.nodes)
    same = len(nodes) == len(others) and all(
        a.op == b.op and a.target == b.target for a, b in zip(nodes, others, strict=False)
    )
    if not same:
        return ["forward does other things in training mode; the traced network does in both modes what eval mode does"]
    mapped = dict(zip(others, nodes, strict=True))
    notes, n_dropouts = [], 0
    for a, b in zip(nodes, others, strict=True):
        other_args = fx.map_arg((b.args, b.kwargs), lambda n: mapped[n])
        if (a.args, a.kwargs) == other_args:
            continue
        make = _DROPOUTS.get(a.target)
        if make is None:
            notes.append(
                f"{a.name}: its arguments differ in training mode; the traced network does what eval mode does"
            )
            continue
        bound = inspect.signature(a.target).bind(*a.args, **a.kwargs)
        bound.apply_defaults()
        while hasattr(module, f"dropout_{n_dropouts}"):
            n_dropouts += 1
        name = f"dropout_{n_dropouts}"
        module.add_submodule(name, make(p=bound.arguments["p"]))
        module.get_submodule(name).train(module.training)
        with graph.inserting_before(a):
            new = graph.call_module(name, (bound.arguments["input"],))
        a.replace_all_uses_with(new)
        graph.erase_node(a)
        mapped[b] = new
    return notes


_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    torch.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
}


# The front ends: torch.fx's own tracer, the one that knows shapes, and torch.export.
VIAS = ("fx", "shapes", "export")
# The order in which they are tried, each with whether parameters may go into functions that torch.fx does not look
# into.
_WAYS = ((("fx", False), ("shapes", True), ("fx", True)), (("export", True),))


def trace(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    who: str = "trace",
    unpacked: bool = False,
    via: str | None = None,
    share: bool = False,
) -> Traced:
    """Trace a copy of `model` on `example` (a tensor or a tuple of tensors, batch first, any batch size).

    The model is left as it is. Every module keeps its train/eval flag. Errors begin with `who`. unpacked: attention
    modules of torch are taken apart where that works (unpack.py), under other names then. via: the only front end to
    use, "fx", "shapes" or "export"; default: the first that follows forward, in this order. share: the copy's
    parameters have the model's memory, for those who only read them (copies.clone).

    Raises TraceError: the example does not fit the model's dtype or device; no front end follows forward (the message
    names module, operator and source line at which torch.fx and torch.export stopped); forward fails on the example.
    """
    if via is not None and via not in VIAS:
        raise TraceError(f"{who}: via got {via!r}, wanted one of {', '.join(VIAS)}")
    for attribute in ("_orig_mod", "module"):
        inner = getattr(model, attribute, None)
        if type(model).__module__.startswith("torch.") and isinstance(inner, nn.Module):
            raise TraceError(f"{who}: model got a {type(model).__name__}, wanted the module inside it: .{attribute}")
    inputs = as_inputs(model, example, who)
    defaults = defaults_of(model, len(inputs), who)
    # Torch's own attention is taken apart if that can be traced; shapes are only known where they have to be, or where
    # parameters go into functions that torch.fx alone does not look into.
    takes = unpacked and any(type(m) is nn.MultiheadAttention for m in model.modules())
    failures: dict[str, Untraceable] = {}
    for ways in _WAYS:
        misfit: TraceError | None = None
        for apart in (True, False) if takes else (False,):
            closed = False
            for way, closed_too in ways:
                if via not in (None, way) or ((way, closed_too) == ("fx", True) and not closed):
                    continue
                try:
                    return _attempt(model, inputs, defaults, who, apart, way, closed_too, share)
                except Closed:
                    closed = True
                except Untraceable as error:
                    failures[way] = error
                    if error.endless:
                        raise TraceError(str(error)) from error.__cause__
                except TraceError as error:  # the example does not fit, or a function that fx runs does not bear it
                    misfit = misfit or error
        if misfit is not None:
            raise misfit
    raise _all_failed(who, failures)


def _all_failed(who: str, failures: dict[str, Untraceable]) -> TraceError:
    """One error that says where each front end stopped."""
    first = failures.get("shapes") or next(iter(failures.values()))
    other = failures.get("export")
    message = str(first)
    if other is not None and other is not first:
        message = f"{who}: {first.got}; and by torch.export {other.got}; wanted {first.wanted}"
    error = TraceError(message)
    error.__cause__ = first.__cause__
    return error


def _attempt(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    defaults: dict[str, Any],
    who: str,
    apart: bool,
    way: str,
    closed_too: bool,
    share: bool,
) -> Traced:
    notes = [f"{name}: its hooks are not part of the traced network" for name in hooked(model)]
    root = clone(model, share)
    for module in root.modules():  # what is left are hooks of the user's; the note says that they are gone
        for kind in _HOOKS:
            getattr(module, kind).clear()
    if apart:
        unpack(root)
    fixed = False
    ghost: Ghost | None = None
    if way == "export":
        graph, training, more, fixed = exported(root, inputs, rebatch(inputs, EXPORT_BATCH), who)
        notes += more
    else:
        probes = [rebatch(inputs, PROBE_BATCH), rebatch(inputs, PROBE_BATCH + 2)]
        ghost = Ghost(root) if way == "shapes" else None
        graph, training = symbolic(root, ghost, probes, defaults, who, closed_too)
    if way != "fx":
        notes.append("forward computes with shapes: the traced network takes inputs of the example's size, any batch")
    in_plain_terms(root, graph, training)
    for g in (graph, training):
        _drop_assertions(g)
    graph._tracer_cls = None  # unpickling wants an importable tracer: torch.fx's own
    module = fx.GraphModule(root, graph, type(model).__name__)
    training.owning_module = module
    notes += _unify_modes(module, graph, training)
    _rebind_mutated(graph, who)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()

    batch, shapes = 0, {}
    failure: TraceError | None = None
    with contextlib.suppress(Exception):  # where it can't be made, running for real shows whether the network works
        ghost = Ghost(module, ghost)
    varies: dict[fx.Node, set[int]] = {}
    for probe in (inputs,) if fixed else (rebatch(inputs, PROBE_BATCH), inputs):
        try:
            shapes = _propagate(module, ghost, probe)
        except _Failed as failed:
            error = failed.__cause__
            assert error is not None
            node = failed.node
            where = f"{node.target} " if node is not None and node.op == "call_module" else ""
            got = f"{where}got {type(error).__name__}{culprit(error)}: {first_line(error)}"
            if way == "export":
                failure = Untraceable(who, got, FOLLOWED)
            else:
                shown = ", ".join(str(tuple(t.shape)) for t in inputs)
                failure = TraceError(f"{who}: {got}; wanted an example that the network takes, got shapes {shown}")
            failure.__cause__ = error
            continue
        batch = probe[0].shape[0] if probe[0].dim() else 1
        break
    else:
        assert failure is not None
        raise failure
    if failure is not None or fixed:
        notes.append("forward works at the example's batch size only")
    else:
        with contextlib.suppress(_Failed):
            other = _propagate(module, ghost, rebatch(inputs, PROBE_BATCH + 2))
            varies = {n: _differing(s, other[n]) for n, s in shapes.items() if isinstance(s, Shape)}
    return Traced(module, shapes, inputs, batch, notes, varies)


def _drop_assertions(graph: fx.Graph) -> None:
    """What a network asserts of its input, the example has passed."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch._assert and not node.users:
            graph.erase_node(node)


class _Failed(Exception):
    """A network that does not take its inputs; `node` is where it stopped."""

    def __init__(self, node: fx.Node | None) -> None:
        self.node = node


def _differing(s: Shape, t: Any) -> set[int]:
    if not isinstance(t, Shape) or len(t) != len(s):
        return set(range(len(s)))
    return {d for d, (m, n) in enumerate(zip(s, t, strict=True)) if m != n}


def _propagate(module: fx.GraphModule, ghost: Ghost | None, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """The shape of every value in eval mode: of the copy without values, or else by running."""
    try:
        assert ghost is not None and isinstance(ghost.module, fx.GraphModule)  # else it is of the untraced network
        runner = _Shapes(ghost.module, ghost)
        with mode(ghost.module, False), torch.no_grad(), ghost.fake:
            runner.run(*(ghost.tensor(t) for t in inputs))
        return {n: runner.shapes[g] for n, g in zip(module.graph.nodes, ghost.module.graph.nodes, strict=True)}
    except Exception:  # whatever it is, running for real shows whether it is the network's
        own(module)
        runner = _Shapes(module)
    try:
        with mode(module, False), torch.no_grad():
            runner.run(*(t.clone() for t in inputs))
    except Exception as error:
        raise _Failed(runner.current) from error
    return runner.shapes
