"""Tracers: torch.fx's own, and one that knows shapes, for networks whose forward branches or computes on them.

Both keep the modules of torch.nn as they are, so that what they give trains. (torch.export, which follows the same
branches, does not: its graphs are of ATen operations with normalisation frozen in one mode.)
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import _symbolic_trace
from torch.fx.proxy import Proxy
from torch.utils import _pytree as pytree

from .copies import deep_copy
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


# What a tracer wants of a forward.
FOLLOWED = "a forward that torch.fx or torch.export follows: no branches on the values of tensors"

# A network that unrolls into more operations than this would take minutes: the module where it happens is named.
MAX_NODES = 100_000

_LIBRARIES = ("torch", "_operator", "operator", "builtins", "math")
# In front of the files that are not the user's; with a separator, since other packages begin with "torch" too.
_NOT_THE_USERS = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parent) + os.sep, "<")


def _origin(function: Any) -> str:
    """The library that a function is from."""
    return str((getattr(function, "__module__", None) or "torch").split(".")[0])


_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout)
# Methods that change in place what a tensor is, and not only what it holds.
_CHANGING: tuple[str, ...] = ("unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "resize_")
_CHANGING += ("resize_as_", "set_", "as_strided_", "requires_grad_", "detach_")


_EVERY_MODULES = frozenset(vars(nn.Module()))


class _Unkeyed(Exception):
    """Arguments that no key stands for."""


class Ghost:
    """A copy of a module without values, and inputs like it: running it gives shapes and takes no time."""

    def __init__(self, module: nn.Module, earlier: Ghost | None = None) -> None:
        """earlier: a ghost of the same network in another form, whose knowledge is shared."""
        self.fake: FakeTensorMode = earlier.fake if earlier else FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[Any, Any] = earlier._known if earlier else {}
        self._tensors: dict[Any, Tensor] = earlier._tensors if earlier else {}
        self._layers: dict[str, Any] = {}
        with self.fake:
            memo = {id(t): self._like(t) for t in (*module.parameters(), *module.buffers())}
        self.module = deep_copy(module, memo)

    def _like(self, t: Tensor) -> Tensor:
        """A tensor or parameter without values; one for all that are alike."""
        shape, is_parameter = (t.shape, t.stride(), t.dtype, t.device), isinstance(t, nn.Parameter)
        key = (*shape, is_parameter and t.requires_grad, is_parameter)
        if key not in self._tensors:
            like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            self._tensors[key] = nn.Parameter(like, requires_grad=t.requires_grad) if is_parameter else like
        return self._tensors[key]

    def tensor(self, t: Tensor) -> Tensor:
        with self.fake:
            return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    def call(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """What a node gives for these arguments; within `self.fake`, without gradients.

        A network repeats itself, over blocks, modes and batch sizes, and shapes alone take torch half a millisecond an
        operation: what was asked before is known. Tensors may then be one object; they hold no values.
        """
        if kind == "call_method" and target in _CHANGING:  # of this tensor only
            args = (args[0].clone(), *args[1:])
        if kind == "get_attr":
            return self._call(kind, target, args, kwargs)
        try:
            key = self._key(kind, target, args, kwargs)
        except _Unkeyed:
            return self._call(kind, target, args, kwargs)
        if key not in self._known:
            self._known[key] = self._call(kind, target, args, kwargs)
        return self._known[key]

    def _call(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if kind == "call_module":
            m = self.module.get_submodule(str(target))
            with _untraced() if m._modules else contextlib.nullcontext():
                return _symbolic_trace._orig_module_call(m, *args, **kwargs)
        if kind == "call_function":
            with contextlib.nullcontext() if _origin(target) in _LIBRARIES else _untraced():
                return target(*args, **kwargs)
        if kind == "get_attr":
            value: Any = self.module
            for part in str(target).split("."):
                value = getattr(value, part)
            return value
        raise LookupError

    def _key(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Equal keys, equal shapes. Raises _Unkeyed."""
        what: Any
        if kind == "call_module":
            what = self._layer(str(target))
        elif target in _CHANGING or (kind == "call_function" and _origin(target) not in _LIBRARIES):
            raise _Unkeyed
        else:
            what = target
        return kind, what, self._signature(args), self._signature(kwargs)

    def _layer(self, path: str) -> Any:
        """What a layer computes shapes by, in either mode."""
        if path not in self._layers:
            m = self.module.get_submodule(path)
            own = {k: v for k, v in vars(m).items() if k not in _EVERY_MODULES}
            if type(m).__module__.startswith("torch.nn."):  # what is not plain in these only initialises
                own = {k: v for k, v in own.items() if isinstance(v, (*_PLAIN, tuple, list))}
            if m._modules or m._forward_hooks or m._forward_pre_hooks:
                raise _Unkeyed
            self._layers[path] = (type(m), *map(self._signature, (own, m._parameters, m._buffers)))
        return self._layers[path]

    def _signature(self, value: Any) -> Any:
        if isinstance(value, FakeTensor):
            own = (value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.requires_grad)
            return (Tensor, *own, isinstance(value, nn.Parameter))
        if type(value) in _PLAIN or value is Ellipsis:
            return (type(value), value)
        if isinstance(value, (tuple, list)):
            return (type(value), *map(self._signature, value))
        if isinstance(value, dict):
            return (dict, *((k, self._signature(v)) for k, v in value.items()))
        if isinstance(value, slice):
            return (slice, self._signature((value.start, value.stop, value.step)))
        raise _Unkeyed


def is_identity(m: nn.Module) -> bool:
    """Whether a module without tensors hands its input on in evaluation mode: stochastic depth, kinds of dropout."""
    if type(m).__module__.startswith("torch.") or next(m.parameters(), None) is not None:
        return False
    if next(m.buffers(), None) is not None or next(m.children(), None) is not None:
        return False
    x = torch.zeros(1, 1, 1, 1)
    try:
        with mode(m, False), torch.no_grad():
            return m.forward(x) is x  # not a call, which a tracer may have taken over
    except Exception:
        return False


class _Tracer(fx.Tracer):
    """torch.fx's tracer with the package's layers as leaves and the path to the module that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[str] = []
        self.count = 0
        # Parameters and buffers by identity; torch.fx goes through all of them for each that it meets.
        self._names: dict[int, tuple[str, Tensor]] | None = None

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.count += 1
        if self.count > MAX_NODES:
            raise RuntimeError(f"more than {MAX_NODES} operations")
        node = super().create_node(*args, **kwargs)
        if not node.stack_trace:  # torch records the whole stack, which takes longer than all else
            node.stack_trace = _users_line()
        return node

    def _name_of(self, t: Tensor) -> str | None:
        """What the network calls one of its tensors."""
        if self._names is None:
            self._names = {id(t): (n, t) for n, t in (*self.root.named_parameters(), *self.root.named_buffers())}
        name, found = self._names.get(id(t), (None, None))
        return name if found is t else None

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if not isinstance(attr_val, nn.Parameter):
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        name = self._name_of(attr_val)
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        name = self._name_of(a) if isinstance(a, Tensor) else None
        return super().create_arg(a) if name is None else self.create_node("get_attr", name, (), {})

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__ == "structadmm.nn"
        return ours or super().is_leaf_module(m, module_qualified_name) or is_identity(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Not popped on an exception: what is left names the culprit.
        self.at.append(self.path_of_module(m))
        out = super().call_module(m, forward, args, kwargs)
        self.at.pop()
        return out


def _users_line() -> str | None:
    """The innermost line of the user's that is being run, as a traceback shows it."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return None
    code = frame.f_code
    source = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n    {source}'


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Calls of modules are calls again, within a trace.

    Not for long, and not for what calls no modules: with every change of nn.Module, Python forgets what it knows of all
    its subclasses, which takes a millisecond.
    """
    cls: Any = nn.Module
    if cls.__call__ is _symbolic_trace._orig_module_call:
        yield
        return
    call, attribute = cls.__call__, cls.__getattr__
    cls.__call__, cls.__getattr__ = _symbolic_trace._orig_module_call, _symbolic_trace._orig_module_getattr
    try:
        yield
    finally:
        cls.__call__, cls.__getattr__ = call, attribute


_NEW = ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")
_ASKED = ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad", "itemsize", "nbytes", "is_sparse")


# Operations whose result shares memory with their input.
VIEWS = {"view", "reshape", "flatten", "getitem", "transpose", "permute", "squeeze", "unsqueeze", "chunk", "split"}
VIEWS |= {"narrow", "select", "unbind", "detach", "expand", "unflatten", "Flatten", "Identity", "contiguous"}


def assigned(x: Tensor, index: Any, value: Any) -> Tensor:
    """x after x[index] = value, as a tensor of its own."""
    if isinstance(x, Proxy):  # unpickling a GraphModule traces it again
        again: Any = x.tracer.create_proxy("call_function", assigned, (x, index, value), {})
        return again
    x = x.clone()
    x[index] = value
    return x


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

    def __setitem__(self, index: Any, value: Any) -> None:
        target = self.node.target
        if (target if isinstance(target, str) else getattr(target, "__name__", "")) in VIEWS:
            raise TypeError("writes into a view of a tensor")
        new: Any = self.tracer.create_proxy("call_function", assigned, (self, index, value), {})
        self.node, self.values = new.node, new.values

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
        self.seen: dict[fx.Node, tuple[Any, Any]] = {}
        self.waiting = [(ghost.tensor(a), ghost.tensor(b)) for a, b in zip(*inputs, strict=True)]

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
        if kind == "call_method" and target in _NEW:
            made = self._constant(target, args, kwargs)
            if made is not None:
                return made
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if kind == "placeholder":
            if self.waiting and str(target).lstrip("*") not in self.defaults:
                proxy.values = self.seen[proxy.node] = self.waiting.pop(0)
            return proxy
        values = []
        try:
            with self.ghost.fake, torch.no_grad():
                for i in (0, 1):
                    values.append(self._value(kind, target, args, kwargs, i))
        except Exception:
            return proxy  # nothing is known of it; what needs to know says so
        proxy.values = self.seen[proxy.node] = (values[0], values[1])
        return self._settled(proxy)

    def _constant(self, target: str, args: Any, kwargs: Any) -> Tensor | None:
        """A tensor made of numbers that are known, such as a mask that is then written into."""
        like = args[0].values if isinstance(args[0], _Known) else None
        rest = [*args[1:], *kwargs.values()]
        if like is None or any(isinstance(p, Proxy) for p in pytree.tree_leaves(rest)):
            return None
        base = torch.empty(0, dtype=like[0].dtype, device=like[0].device)
        made: Tensor = getattr(base, target)(*args[1:], **kwargs)
        return made

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
            # By the node: what an attribute of a proxy stands for is a proxy of another kind.
            if p.node not in self.seen:
                raise LookupError
            return self.seen[p.node][i]

        aggregate: Any = fx.node.map_aggregate
        given = args
        args, kwargs = aggregate((args, kwargs), known)
        value = self.ghost.call(kind, target, args, kwargs)
        if kind == "call_method" and target in _CHANGING and isinstance(given[0], Proxy):
            pair = list(self.seen[given[0].node])
            pair[i] = value
            self.seen[given[0].node] = (pair[0], pair[1])
            given[0].values = self.seen[given[0].node]  # type: ignore[attr-defined]
        return value


def culprit(error: BaseException) -> str:
    """Where in the user's code an exception was raised: `file:line: source`, or nothing."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_NOT_THE_USERS):
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


class Untraceable(TraceError):
    """A forward that a tracer can't follow.

    got: the part of the message that says where it stopped. endless: no other tracer should try.
    """

    def __init__(self, who: str, got: str, wanted: str, endless: bool = False) -> None:
        super().__init__(f"{who}: {got}; wanted {wanted}")
        self.got, self.wanted, self.endless = got, wanted, endless


def symbolic(
    model: nn.Module,
    ghost: Ghost | None,
    probes: Sequence[Sequence[Tensor]],
    defaults: dict[str, Any],
    who: str,
    closed_too: bool,
) -> tuple[fx.Graph, fx.Graph]:
    """Graphs of the network in evaluation and in training.

    ghost: the model's, for the tracer that knows shapes; None: torch.fx's own. probes: inputs at two batch sizes.
    closed_too: parameters may go into functions that torch.fx was told not to look into; Closed where they do and may
    not. Raises Untraceable naming the module and the source line where the tracer can't follow.
    """
    tracer: _Tracer | None = None
    graphs = []
    try:
        for training in (False, True):
            quiet = contextlib.nullcontext()
            with (
                mode(model, training),
                mode(ghost.module, training) if ghost else quiet,
                _unwrapped() if ghost else quiet,
            ):
                tracer = _ShapeTracer(ghost, probes, defaults) if ghost else _Tracer()
                graph = tracer.trace(model, concrete_args=defaults or None)
            _drop_defaults(graph, defaults)
            if not closed_too and _closed(graph):
                raise Closed
            graphs.append(graph)
    except Closed:
        raise
    except Exception as error:
        path = next((p for p in reversed(tracer.at) if p), "") if tracer else ""
        module = model.get_submodule(path)
        name = f"{path} ({type(module).__name__})" if path else type(module).__name__
        got = f"{name} got {type(error).__name__}{culprit(error)}: {first_line(error)}"
        raise Untraceable(who, got, FOLLOWED, tracer is not None and tracer.count > MAX_NODES) from error
    return graphs[0], graphs[1]


class Closed(Exception):
    """Parameters go into functions that torch.fx was told not to look into."""


def _closed(graph: fx.Graph) -> bool:
    for node in graph.nodes:
        given = node.op == "call_function" and any(n.op == "get_attr" for n in node.all_input_nodes)
        if given and _origin(node.target) not in _LIBRARIES:
            return True
    return False


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Functions marked by torch.fx.wrap are followed, since shapes are known inside; builtins are not."""
    table: Any = _symbolic_trace._wrapped_fns_to_patch
    saved = dict(table)
    for key, scope in saved.items():
        if inspect.isfunction(scope.get(key[1])):
            table.pop(key)
    try:
        yield
    finally:
        table.clear()
        table.update(saved)


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
