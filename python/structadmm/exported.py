"""Graphs by torch.export, for forwards that torch.fx's tracers can't follow, in the terms that torch.fx's graphs use.

torch.export runs forward on tensors without values, so it follows any Python that does not ask for values: containers
and classes of the network's own, loops over sizes, calls through *args. What it gives is for reading alone: a list of
ATen operations, parameters passed as inputs, modes frozen; aten.py says the same over the modules of the network.
Kinds of dropout and recurrent layers are kept from torch.export, and are modules again. The result trains.

The batch is dynamic, all other sizes are the example's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode, resolve_name

from .aten import Made, Slot, Translation, Unsaid
from .symbolic import FOLLOWED, Untraceable, culprit, first_line, is_identity, mode

# torch.export takes 3 to 10 ms an operation, so a forward with more would take minutes.
MAX_OPERATIONS = 30_000

_RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

_library = torch.library.Library("structadmm_trace", "FRAGMENT")
_library.define("module(Tensor x, str path) -> Tensor")
torch.library.register_fake("structadmm_trace::module", lambda x, path: torch.empty_like(x), lib=_library)
_library.define(
    "recurrent(Tensor x, Tensor[] start, str path, SymInt[] output, SymInt[] state, int states) -> Tensor[]"
)
torch.library.register_fake(
    "structadmm_trace::recurrent",
    lambda x, start, path, output, state, states: [x.new_empty(output), *(x.new_empty(state) for _ in range(states))],
    lib=_library,
)


class _Watch(TorchFunctionMode):
    """Counts the operations of a forward, and remembers the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.last = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count > MAX_OPERATIONS:
            raise RuntimeError(f"more than {MAX_OPERATIONS} operations")
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if not name.endswith((".__get__", ".size", ".dim")):
            self.last = name
        return func(*args, **(kwargs or {}))


class _Flat(nn.Module):
    """The network with a tuple of tensors and numbers as its output; `template` says where in the output they were."""

    def __init__(self, network: nn.Module, found: list[Any], watch: _Watch) -> None:
        super().__init__()
        self.network = network
        self.found, self.watch = found, watch

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        with self.watch:
            out = self.network(*inputs)
        leaves: list[Any] = []
        self.found[:] = [_template(out, leaves)]
        return tuple(leaves)


def _template(value: Any, leaves: list[Any]) -> Any:
    """A nested output with slots for its tensors and sizes, which are appended to `leaves`."""
    if isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        leaves.append(value)
        return Slot(len(leaves) - 1)
    if isinstance(value, torch.Size):
        return tuple(_template(v, leaves) for v in value)
    if isinstance(value, (tuple, list)):
        items = [_template(v, leaves) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return Made(type(value), {k: _template(v, leaves) for k, v in fields.items()})
    if isinstance(value, dict):
        items_of = {k: _template(v, leaves) for k, v in value.items()}
        return items_of if type(value) is dict else Made(type(value), items_of)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"an output that is a {type(value).__name__}, not tensors in tuples, dicts and dataclasses")


def exported(
    root: nn.Module, inputs: Sequence[Tensor], probe: Sequence[Tensor], who: str
) -> tuple[fx.Graph, fx.Graph, list[str], bool]:
    """Graphs of the network in evaluation and in training, over the modules of `root`; notes; whether they are for the
    example's batch size alone.

    inputs: the example. probe: the same at a batch size that no other size of the network equals. Raises Untraceable
    with the operator and the source line where torch.export stops, or with the operation that can't be said in terms of
    torch.fx.
    """
    graphs, notes, dynamic, fixed = [], [], _dynamic(probe), False
    programs: list[tuple[ExportedProgram, Any]] = []
    for training in (False, True):
        watch = _Watch()
        try:
            programs.append(_program(root, probe, training, watch, dynamic))
            if dynamic is not None and not _any_batch(programs[-1][0]):  # forward asks for the batch as a number
                programs[-1] = _program(root, inputs, training, watch, None)
                fixed = True
            graphs.append(Translation(root, *programs[-1], len(inputs)).graph)
        except Exception as error:
            if training:
                notes.append(f"forward can't be followed in training mode ({type(error).__name__}{_place(error)})")
                graphs.append(Translation(root, *programs[0], len(inputs), trains=True).graph)
                break
            raise Untraceable(who, _stop(root, error, watch), FOLLOWED) from error
    return graphs[0], graphs[1], notes, fixed


def _program(
    root: nn.Module, inputs: Sequence[Tensor], training: bool, watch: _Watch, dynamic: Any
) -> tuple[ExportedProgram, Any]:
    """The exported network, and the template of its output."""
    found: list[Any] = []
    with mode(root, training), _leaves(root), _quiet():
        flat = _Flat(root, found, watch)
        program = torch.export.export(flat, tuple(inputs), dynamic_shapes=dynamic, strict=False)
    return program, found[0]


def _any_batch(program: ExportedProgram) -> bool:
    """Whether the sizes of the batch are open."""
    names = {s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    sizes = [n.meta["val"].shape[0] for n in inputs]
    return all(isinstance(n, torch.SymInt) and n.node.maybe_as_int() is None for n in sizes)


def _dynamic(inputs: Sequence[Tensor]) -> Any:
    """torch.export's word for: dimension 0 of all inputs is the batch, and open. None where they have no batch."""
    common = len({t.shape[0] if t.dim() else -1 for t in inputs}) == 1 and inputs[0].dim() > 0
    return (tuple({0: Dim.AUTO} for _ in inputs),) if common else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch logs and prints what it raises."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _leaves(root: nn.Module) -> Iterator[None]:
    """Modules that only training shows (dropout, stochastic depth) and recurrent layers, which ATen takes to steps,
    leave one operation each that names them."""
    changed = []
    for path, m in root.named_modules():
        if type(m) in _RECURRENT:
            m.forward = _RecurrentLeaf(path, m)
            changed.append(m)
        elif type(m) in _DROPOUTS or is_identity(m):
            m.forward = _Leaf(path)
            changed.append(m)
    try:
        yield
    finally:
        for m in changed:
            del m.forward


class _Leaf:
    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.structadmm_trace.module(x, self.path)
        return out


class _RecurrentLeaf:
    def __init__(self, path: str, m: Any) -> None:
        self.path, self.m = path, m

    def __call__(self, input: Any, hx: Any = None) -> Any:
        m = self.m
        if not isinstance(input, Tensor) or input.dim() != 3 or m.proj_size:  # not followed, whoever says it
            return type(m).forward(m, input, hx)
        directions = 2 if m.bidirectional else 1
        output = (*input.shape[:2], directions * m.hidden_size)
        state = (directions * m.num_layers, input.shape[0 if m.batch_first else 1], m.hidden_size)
        start = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
        lstm = isinstance(m, nn.LSTM)
        y, *last = torch.ops.structadmm_trace.recurrent(input, start, self.path, output, state, 1 + lstm)
        return y, tuple(last) if lstm else last[0]


def _chain(error: BaseException) -> list[BaseException]:
    out: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in out:
        out.append(at)
        at = at.__cause__ or at.__context__
    return out


def _place(error: BaseException) -> str:
    return next((place for e in _chain(error) if (place := culprit(e))), "")


def _stop(root: nn.Module, error: BaseException, watch: _Watch) -> str:
    """Module, error, operator and source line at which torch.export stopped."""
    paths = {id(m): path for path, m in root.named_modules()}
    path, module = "", root
    for e in _chain(error):
        at = e.__traceback__
        while at is not None:
            owner = at.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and paths.get(id(owner)):
                path, module = paths[id(owner)], owner
            at = at.tb_next
        if path:
            break
    name = f"{path} ({type(module).__name__})" if path else type(module).__name__
    if isinstance(error, Unsaid):
        return f"{type(root).__name__} got {error}"
    during = f" in {watch.last}" if watch.last else ""
    return f"{name} got {type(error).__name__}{during}{_place(error)}: {first_line(error)}"
