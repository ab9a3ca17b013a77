"""How torch itself runs a network fastest on this CPU: BatchNorm folded, channels-last, weights in oneDNN's own order.

Each form is a whole network behind one layer, `Form`. `structadmm.optimize` measures them beside the compiled runtime,
and keeps one where it is faster.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from .errors import OptimizeError

# given: layers as they are, compacted ones by their kernels. folded: BatchNorm folded, layers dense. onednn: that, with
# weights reordered once and ReLU and residual additions fused, as inductor's freezing does it. inductor: compiled and
# frozen by torch.compile, with channels-last weights.
FORMS = ("given", "folded", "folded_channels_last", "onednn", "onednn_channels_last")
COMPILED = "inductor"

_pointwise: Any = torch.ops.mkldnn._convolution_pointwise if torch.backends.mkldnn.is_available() else None


def _reorders(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes reordered weights of this dtype on this CPU: bfloat16 needs AVX-512 or AVX-NE-CONVERT."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


class Form(nn.Module):
    """A whole network in a form that torch runs fast. Inputs and outputs are the network's own, any layout.

    dtype: of weights and values inside; cast: it is not the network's own, float32.
    """

    def __init__(self, body: fx.GraphModule, name: str, dtype: torch.dtype, cast: bool = False) -> None:
        super().__init__()
        self.body, self.name, self.dtype = body, name, dtype
        self.cast = cast
        self._last = name.endswith("channels_last") or name == COMPILED
        self._compiled: Any = None
        super().train(False)

    def forward(self, *inputs: Tensor) -> Any:
        own = next((x.dtype for x in inputs if x.is_floating_point()), torch.float32)
        inputs = tuple(self._enter(x) for x in inputs)
        body: Any = self.body
        if self.name == COMPILED and not torch.compiler.is_compiling():
            if self._compiled is None:
                self._compiled = torch.compile(body, options={"freezing": True})
            body = self._compiled
        with torch.no_grad():
            out = body(*inputs)
        if not self.cast:
            return out
        return fx.node.map_aggregate(out, lambda t: t.to(own) if isinstance(t, Tensor) and t.is_floating_point() else t)

    def _enter(self, x: Tensor) -> Tensor:
        if x.is_floating_point() and x.dtype is not self.dtype:
            x = x.to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self._last and x.dim() == 4 else x

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise OptimizeError("Form: mode got training, wanted eval: a network from optimize is for inference")
        return super().train(mode)

    def network(self, path: str) -> fx.GraphModule:
        return self.body

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}


class VendorConv2d(nn.Conv2d):
    """relu(conv(x) + residual), either optional, on a weight that oneDNN has put in its own order for x's shape."""

    relu = False
    adds = False
    _kept: Any

    @classmethod
    def of(cls, conv: nn.Conv2d) -> VendorConv2d:
        new: Any = copy.copy(conv)  # shares the parameters
        new.__class__ = cls
        new._parameters, new._buffers = dict(conv._parameters), dict(conv._buffers)
        new.relu, new._kept = False, {}
        return new

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        kept = self._reordered(x)
        if kept is None:
            y = super().forward(x)
            y = y if residual is None else y + residual
            return torch.relu(y) if self.relu else y
        w, b = kept
        sizes = (self.padding, self.stride, self.dilation, self.groups)
        if residual is None:
            return _pointwise(x, w, b, *sizes, "relu" if self.relu else "none", [], "")
        act = "relu" if self.relu else None
        return _pointwise.binary(x, residual, w, b, *sizes, "add", None, act, [], None)

    def _reordered(self, x: Tensor) -> Any:
        w: Any = self._parameters["weight"]
        b = self._parameters["bias"]
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
            return None
        if x.dtype is not w.dtype or not _reorders(x.dtype):
            return None
        if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
            return None
        key = (x.shape, x.dtype, x.is_contiguous(), w.data_ptr(), 0 if w.is_inference() else w._version)
        kept = self._kept.get(key)
        if kept is None:
            if len(self._kept) >= 4:
                self._kept.clear()
            with torch.inference_mode(False), torch.no_grad():
                order = (self.padding, self.stride, self.dilation, self.groups, list(x.shape))
                packed = torch.ops.mkldnn._reorder_convolution_weight(w.detach(), *order)
            kept = self._kept[key] = (packed, None if b is None else b.detach())
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def network(self, path: str) -> fx.GraphModule:
        """The convolution, the addition and the ReLU as separate operations, the convolution at `path`."""
        conv: Any = copy.copy(self)
        conv.__class__ = nn.Conv2d
        conv.__dict__ = {k: v for k, v in self.__dict__.items() if k not in ("_kept", "relu", "adds")}
        graph = fx.Graph()
        x = graph.placeholder("x")
        residual = graph.placeholder("residual") if self.adds else None
        root = nn.Module()
        owner = root
        *parents, last = path.split(".")
        for part in parents:
            owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.add_module(last, conv)
        y = graph.call_module(path, (x,))
        if residual is not None:
            y = graph.call_function(operator.add, (y, residual))
        graph.output(graph.call_function(F.relu, (y,)) if self.relu else y)
        return fx.GraphModule(root, graph, "Layer")


def densify(network: fx.GraphModule, layers: set[str] | None = None) -> None:
    """Compacted layers (all, or those named) become dense ones, in place."""
    for path, m in list(network.named_modules()):
        if layers is not None and path not in layers:
            continue
        if hasattr(m, "to_dense") and type(m).__module__ == "structadmm.nn":
            owner, _, name = path.rpartition(".")
            setattr(network.get_submodule(owner), name, m.to_dense().requires_grad_(False).eval())


def fold_norms(network: fx.GraphModule, layers: set[str] | None = None) -> None:
    """BatchNorm behind a convolution or linear layer (any, or those named) goes into its weight, in place."""
    modules = dict(network.named_modules())
    calls = Counter(n.target for n in network.graph.nodes if n.op == "call_module")
    for node in list(network.graph.nodes):
        norm = modules.get(node.target) if node.op == "call_module" else None
        source: Any = node.args[0] if node.args else None
        if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) or norm.running_mean is None:
            continue
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        layer: Any = modules[str(source.target)]
        if calls[source.target] > 1 or (layers is not None and source.target not in layers):
            continue
        if type(layer) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d):
            fused: Any = fuse_conv_bn_eval(layer, norm)
        elif type(layer) is nn.Linear and isinstance(norm, nn.BatchNorm1d):
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        owner, _, name = str(source.target).rpartition(".")
        setattr(network.get_submodule(owner), name, fused)
        modules[str(source.target)] = fused
        node.replace_all_uses_with(source)
        network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()


def _is_relu(node: fx.Node, network: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return type(network.get_submodule(str(node.target))) is nn.ReLU
    return node.target in (torch.relu, F.relu, "relu", torch.relu_, F.relu_, "relu_") and len(node.args) == 1


def use_vendor(network: fx.GraphModule, layers: Mapping[str, bool | None] | None = None) -> None:
    """Convolutions become VendorConv2d, with a residual addition and ReLU behind them, in place.

    layers: which, and whether an addition is fused (None: if the values' nodes carry the same meta["shape"]); without
    it all.
    """
    if _pointwise is None:
        return
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    calls = Counter(n.target for n in network.graph.nodes if n.op == "call_module")

    def adds(a: fx.Node, b: fx.Node) -> bool:  # one that broadcasts can't be fused
        told = layers[str(b.target)] if layers is not None else None
        if told is not None:
            return told
        return a.meta.get("shape") is not None and a.meta.get("shape") == b.meta.get("shape")

    for node in list(network.graph.nodes):
        if node.op != "call_module" or (layers is not None and node.target not in layers) or calls[node.target] > 1:
            continue
        conv = network.get_submodule(str(node.target))
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        new = VendorConv2d.of(conv)
        last, residual = node, None
        user = _only_user(last)
        if user is not None and user.target in (operator.add, torch.add, operator.iadd, "add", "add_"):
            others: Any = [a for a in user.args if a is not last]
            both = len(user.args) == 2 and not user.kwargs and len(others) == 1 and isinstance(others[0], fx.Node)
            if both and order.get(others[0], len(order)) < order[node] and adds(others[0], node):
                last, residual = user, others[0]
                user = _only_user(last)
        if user is not None and _is_relu(user, network):
            last, new.relu = user, True
        new.adds = residual is not None
        owner, _, name = str(node.target).rpartition(".")
        setattr(network.get_submodule(owner), name, new)
        if residual is not None:
            node.args = (node.args[0], residual)
        if last is not node:
            last.replace_all_uses_with(node)
            for dead in (last, *last.all_input_nodes):
                if dead is not node and not dead.users and dead.op not in ("placeholder", "output"):
                    network.graph.erase_node(dead)
    network.graph.lint()
    network.delete_all_unused_submodules()
    network.recompile()


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def make(
    network: fx.GraphModule, name: str, dtype: torch.dtype | None = None, layers: Mapping[str, bool] | None = None
) -> fx.GraphModule:
    """A network of one layer, the given one in a form; `network` (in eval mode) is left as it is.

    dtype: of weights and values inside. layers: as for use_vendor.
    """
    body = copy.deepcopy(network).requires_grad_(False)
    for old, new in zip(network.graph.nodes, body.graph.nodes, strict=True):
        new.meta["shape"] = old.meta.get("shape")
    if name != "given":
        densify(body)
        fold_norms(body)
    if name.startswith("onednn"):
        use_vendor(body, layers)
    own = next((p.dtype for p in body.parameters() if p.is_floating_point()), torch.float32)
    if dtype is not None and dtype is not own:
        body = body.to(dtype)
    if name.endswith("channels_last") or name == COMPILED:
        body = body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    graph = fx.Graph()
    inputs = tuple(graph.placeholder(n.target) for n in network.graph.nodes if n.op == "placeholder")
    graph.output(graph.call_module("form", inputs))
    root = nn.Module()
    root.add_module("form", Form(body.eval(), name, dtype or own, dtype is not None and dtype is not own))
    fast = fx.GraphModule(root, graph, type(network).__name__)
    fast.meta.update({k: v for k, v in network.meta.items() if k == "structadmm"})
    return fast.eval()
