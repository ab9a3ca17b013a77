"""Tracers: torch.fx's own, and one that knows shapes, for networks whose forward branches or computes on them.

Both keep the modules of torch.nn as they are, so that what they give trains. (torch.export, which follows the same
branches, does not: its graphs are of ATen operations with normalisation frozen in one mode.)
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import linecache
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import Proxy

from .errors import TraceError


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All of `model` in one mode for a while; every module's own flag is restored."""
    flags = {m: m.training for m in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


class Ghost:
    """A copy of a module without values, and inputs like it: running it gives shapes and takes no time."""

    def __init__(self, module: nn.Module) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        memo: dict[int, Any] = {}
        with self.fake:
            for t in (*module.parameters(), *module.buffers()):
                like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
                is_parameter = isinstance(t, nn.Parameter)
                memo[id(t)] = nn.Parameter(like, requires_grad=t.requires_grad) if is_parameter else like
        self.module = copy.deepcopy(module, memo)

    def tensor(self, t: Tensor) -> Tensor:
        with self.fake:
            return torch.empty(t.shape, dtype=t.dtype, device=t.device)


class _Tracer(fx.Tracer):
    """torch.fx's tracer with the package's layers as leaves and the path to the module that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.record_stack_traces = True
        self.at: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__ == "structadmm.nn" or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Not popped on an exception: what is left names the culprit.
        self.at.append(self.path_of_module(m))
        out = super().call_module(m, forward, args, kwargs)
        self.at.pop()
        return out


_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout)
_ASKED = ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad", "itemsize", "nbytes", "is_sparse")


class _Known(Proxy):
    """A proxy that knows what it stands for, without values, at two batch sizes.

    What is the same number at both, such as a channel count, is that number; what is not depends on the batch.
    """

    values: tuple[Any, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name in _ASKED and self.values is not None:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __iter__(self) -> Iterator[Any]:
        if self.values is None:
            return super().__iter__()
        this: Any = self
        return iter([this[i] for i in range(len(self))])

    def __len__(self) -> int:
        if self.values is None or len(self.values[0]) != len(self.values[1]):
            raise TypeError("its length depends on the batch size")
        return len(self.values[0])

    def __bool__(self) -> bool:
        if self.values is not None and all(isinstance(v, bool) for v in self.values):
            raise TypeError("the condition depends on the batch size")
        return super().__bool__()


class _ShapeTracer(_Tracer):
    def __init__(self, ghost: Ghost, inputs: Sequence[Sequence[Tensor]], defaults: dict[str, Any]) -> None:
        super().__init__()
        self.ghost, self.defaults = ghost, defaults
        self.waiting = [tuple(ghost.tensor(t) for t in pair) for pair in zip(*inputs, strict=True)]

    def proxy(self, node: fx.Node) -> Proxy:
        return _Known(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *rest: Any,
        **options: Any,
    ) -> Any:
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if kind == "placeholder":
            if self.waiting and str(target).lstrip("*") not in self.defaults:
                proxy.values = self.waiting.pop(0)
            return proxy
        values = []
        try:
            with self.ghost.fake, torch.no_grad():
                for i in (0, 1):
                    values.append(self._value(kind, target, args, kwargs, i))
        except Exception:
            return proxy  # nothing is known of it; what needs to know says so
        proxy.values = (values[0], values[1])
        return self._settled(proxy)

    def _settled(self, proxy: Any) -> Any:
        a, b = proxy.values
        if isinstance(a, _PLAIN) and type(a) is type(b) and a == b:
            return a
        if isinstance(a, torch.Size) and isinstance(b, torch.Size) and len(a) == len(b):
            sizes = [m if m == n else proxy[i] for i, (m, n) in enumerate(zip(a, b, strict=True))]
            return torch.Size(sizes) if a == b else tuple(sizes)
        return proxy

    def _value(self, kind: str, target: Any, args: Any, kwargs: Any, i: int) -> Any:
        def known(p: Any) -> Any:
            if not isinstance(p, Proxy):
                return p
            values: Any = getattr(p, "values", None)
            if values is None:
                raise LookupError
            return values[i]

        aggregate: Any = fx.node.map_aggregate
        args, kwargs = aggregate((args, kwargs), known)
        if kind == "get_attr":
            value: Any = self.ghost.module
            for part in str(target).split("."):
                value = getattr(value, part)
            return value
        if kind == "call_module":
            return self.ghost.module.get_submodule(str(target))(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if kind == "call_function":
            return target(*args, **kwargs)
        raise LookupError


def culprit(error: BaseException) -> str:
    """Where in the user's code an exception was raised: `file:line: source`, or nothing."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(ours):
            line = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f" at {frame.filename}:{frame.lineno} `{line}`"
    return ""


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def defaults_of(model: nn.Module, n_inputs: int, who: str) -> dict[str, Any]:
    """Arguments of forward that the example leaves at their defaults: tracing must see the values, not stand-ins for
    them."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    needed = sum(p.default is p.empty for p in positional)
    if n_inputs < needed or (n_inputs > len(positional) and not variadic):
        names = ", ".join(p.name for p in positional)
        raise TraceError(f"{who}: example got {n_inputs} tensors, wanted one for each argument of forward({names})")
    return {p.name: p.default for p in positional[n_inputs:]}


def symbolic(
    model: nn.Module, inputs: Sequence[Sequence[Tensor]], defaults: dict[str, Any], who: str
) -> tuple[fx.Graph, fx.Graph, bool]:
    """Graphs of the network in evaluation and in training, and whether shapes had to be known for them.

    inputs: the network's, at two batch sizes. Raises TraceError naming module and source line where neither tracer can
    follow.
    """
    tracers: list[_Tracer] = []

    def graph_in(training: bool, ghost: Ghost | None) -> fx.Graph:
        with mode(model, training), mode(ghost.module, training) if ghost else contextlib.nullcontext():
            tracers.append(_ShapeTracer(ghost, inputs, defaults) if ghost else _Tracer())
            graph = tracers[-1].trace(model, concrete_args=defaults or None)
        _drop_defaults(graph, defaults)
        return graph

    try:
        return graph_in(False, None), graph_in(True, None), False
    except Exception:
        ghost = Ghost(model)
    try:
        return graph_in(False, ghost), graph_in(True, ghost), True
    except Exception as error:
        path = next((p for p in reversed(tracers[-1].at) if p), "")
        module = model.get_submodule(path)
        name = f"{path} ({type(module).__name__})" if path else type(module).__name__
        raise TraceError(
            f"{who}: {name} got {type(error).__name__}{culprit(error)}: {first_line(error)}; "
            "wanted a forward that torch.fx traces: no branches on the values of tensors, no item assignment"
        ) from error


def _drop_defaults(graph: fx.Graph, defaults: dict[str, Any]) -> None:
    for node in graph.nodes:
        node.type = None  # annotations may be strings, which generated code cannot import when it is pickled
    # Arguments left at their defaults are constants now: drop their stand-ins and torch.fx's assertions about them.
    stand_ins = [n for n in graph.nodes if n.op == "placeholder" and n.target.removesuffix("_1") in defaults]
    for placeholder in stand_ins:
        for user in list(placeholder.users):
            for assertion in [user, *user.users]:
                if not assertion.users and assertion.target not in ("output",):
                    graph.erase_node(assertion)
            if user.graph is graph and user in placeholder.users and not user.users:
                graph.erase_node(user)
        if not placeholder.users:
            graph.erase_node(placeholder)
