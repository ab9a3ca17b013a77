"""The runtimes that a user of a dense network could pick, each as a callable without arguments.

    peers = build(net, x, dtype="f32", threads=1)     # net: an eval module, x: f32 NCHW
    peers.calls["openvino"]()                          # one inference
    peers.absent["onnxruntime"]                        # why it isn't there

Every peer takes f32 NCHW and leaves f32 NCHW, and its time counts what that costs: a change of layout or of dtype on
the way in and out is the peer's own. Input and output memory is the caller's where the peer can (OpenVINO: shared
tensors; ONNX Runtime: bindings). In the bf16 class the values inside are bf16.

Two kinds of peers are marked: `native` ones take and leave their own layout and dtype (channels-last, bf16), so their
times leave out what others pay, and are shown beside the score, not in it.

A peer whose package isn't installed (`pip install structadmm[bench]`) or that refuses the network is left out, and
`absent` says why.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], object]

# Largest allowed norm of the difference over the norm of eager f32's output. A value of bf16 is off by up to 2^-9 of
# itself and a layer's sum averages that out; fifty layers that each add as much, and a residual sum that leaves less
# than it adds, make up to a tenth of it. A wrong answer is off by 1.
TOLERANCE = {"f32": 1e-3, "bf16": 0.1}

F32 = ("eager", "channels_last", "onednn", "onednn_channels_last", "inductor", "inductor_channels_last",
       "onnxruntime", "openvino")  # fmt: skip
BF16 = ("eager_bf16", "autocast_bf16", "channels_last_bf16", "onednn_bf16", "inductor_bf16", "openvino_bf16")
NATIVE = {
    "f32": ("channels_last_native", "onednn_channels_last_native"),
    "bf16": ("channels_last_bf16_native", "onednn_bf16_native"),
}
NAMES = {"f32": F32, "bf16": BF16}


@dataclass
class Peers:
    calls: dict[str, Call] = field(default_factory=dict)
    native: dict[str, Call] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # relative difference from eager f32
    versions: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """The peer has no way to run this network."""


def reordered(conv: nn.Conv2d, x: Tensor) -> Call:
    """The convolution on a weight that oneDNN has put in its own order for this input."""
    mkldnn = torch.ops.mkldnn
    sizes = (conv.padding, conv.stride, conv.dilation, conv.groups)
    w = mkldnn._reorder_convolution_weight(conv.weight.detach(), *sizes, x.shape)
    b = None if conv.bias is None else conv.bias.detach()
    return lambda: mkldnn._convolution_pointwise(x, w, b, *sizes, "none", [], "")


class _Reordered(nn.Module):
    """A convolution whose weight is in oneDNN's order for inputs of one shape, with the ReLU after it fused."""

    def __init__(self, conv: nn.Conv2d, shape: Sequence[int]):
        super().__init__()
        self.sizes = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.w = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self.sizes, list(shape))
        self.b = None if conv.bias is None else conv.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self.w, self.b, *self.sizes, "none", [], "")


def _convs(net: nn.Module) -> list[str]:
    return [name for name, m in net.named_modules() if type(m) is nn.Conv2d]


def _input_shapes(net: nn.Module, x: Tensor) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            shapes[name] = args[0].shape

        return hook

    hooks = [net.get_submodule(name).register_forward_pre_hook(note(name)) for name in _convs(net)]
    net(x)
    for hook in hooks:
        hook.remove()
    return shapes


def fold_batchnorm(net: nn.Module) -> nn.Module:
    """A copy with BatchNorm folded into convolutions, as a user of eager torch would have it (torch.fx)."""
    from torch.fx.experimental.optimization import fuse

    return net if isinstance(net, nn.Conv2d) else fuse(net)


def _reorder_all(net: nn.Module, x: Tensor) -> nn.Module:
    shapes = _input_shapes(net, x)
    if isinstance(net, nn.Conv2d):
        return _Reordered(net, x.shape)
    net = copy.deepcopy(net)
    for name, shape in shapes.items():
        parent, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(parent), leaf, _Reordered(net.get_submodule(name), shape))
    return net


def _last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _as_module(net: nn.Module) -> nn.Module:
    """Not a bare layer: exporters and compilers want a network."""
    return nn.Sequential(net) if isinstance(net, nn.Conv2d) else net


def _inductor(
    net: nn.Module, x: Tensor, wrap: Callable[[nn.Module], nn.Module] = lambda n: n
) -> Callable[[Tensor], Tensor]:
    import torch._inductor.config

    compiled = torch.compile(wrap(_as_module(copy.deepcopy(net))), fullgraph=True, dynamic=False)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        compiled(x)
        compiled(x)
    return compiled


class _InDtype(nn.Module):
    """The network in another dtype and in channels-last, f32 NCHW outside."""

    def __init__(self, net: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.net = net.to(dtype).to(memory_format=torch.channels_last)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x.to(dtype=self.dtype, memory_format=torch.channels_last))
        return y.to(dtype=torch.float32, memory_format=torch.contiguous_format)


def onnx_bytes(net: nn.Module, x: Tensor) -> bytes:
    """The network as an ONNX model of this input's shape."""
    buffer = io.BytesIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        program = torch.onnx.export(_as_module(net), (x,), dynamo=True, input_names=["x"], output_names=["y"])
    program.save(buffer)
    return buffer.getvalue()


def _onnxruntime(net: nn.Module, x: Tensor, y: Tensor, threads: int) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(onnx_bytes(net, x), options, providers=["CPUExecutionProvider"])
    bound = session.io_binding()
    sides = ((bound.bind_input, session.get_inputs()[0].name, x), (bound.bind_output, session.get_outputs()[0].name, y))
    for bind, name, t in sides:
        bind(name, "cpu", 0, t.numpy().dtype, tuple(t.shape), t.data_ptr())

    def call(_memory: tuple[Tensor, Tensor] = (x, y)) -> None:
        session.run_with_iobinding(bound)

    return call


def _openvino(net: nn.Module, x: Tensor, y: Tensor, threads: int, precision: str) -> Call:
    import openvino as ov

    # Straight from the torch module where its frontend reads this torch, else through ONNX.
    try:
        model = ov.convert_model(_as_module(net), example_input=x, input=list(x.shape))
    except Exception:
        import onnx  # noqa: F401

        model = ov.convert_model(io.BytesIO(onnx_bytes(net, x)))
        model.reshape(list(x.shape))
    compiled = ov.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(ov.Tensor(y.numpy(), shared_memory=True))

    # infer() runs on the calling thread; start_async() and wait() hop to another one and back, 120 microseconds a call.
    def call(_memory: tuple[Tensor, Tensor] = (x, y)) -> None:
        request.infer(share_inputs=True, share_outputs=True)

    return call


def _make(
    name: str, net: nn.Module, folded: nn.Module, x: Tensor, y: Tensor, threads: int
) -> tuple[Call, Callable[[], Tensor]]:
    """The peer's call, and what its last call left as f32 NCHW."""
    if name.startswith("onnxruntime"):
        call = _onnxruntime(net, x, y, threads)
        return call, lambda: y
    if name.startswith("openvino"):
        call = _openvino(net, x, y, threads, "bf16" if "bf16" in name else "f32")
        return call, lambda: y

    native = name.endswith("_native")
    bf16 = "bf16" in name
    last = "channels_last" in name or (bf16 and name != "eager_bf16")
    if name == "autocast_bf16":
        model: Any = copy.deepcopy(folded).to(memory_format=torch.channels_last)

        def autocast() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(_last(x)).to(dtype=torch.float32, memory_format=torch.contiguous_format)

        return autocast, autocast
    if name.startswith("inductor"):
        if bf16:
            compiled = _inductor(net, x, lambda n: _InDtype(n, torch.bfloat16))
        elif last:
            compiled = _inductor(net, x, lambda n: _InDtype(n, torch.float32))
        else:
            compiled = _inductor(net, x)
        return (lambda: compiled(x)), (lambda: compiled(x))
    # Convolutions see the inputs of their own dtype and layout when they choose the weight's order.
    model = copy.deepcopy(folded)
    dtype = torch.bfloat16 if bf16 else torch.float32
    inside = x.to(dtype)
    if bf16:
        model = model.to(dtype)
    if last:
        model, inside = model.to(memory_format=torch.channels_last), _last(inside)
    if name.startswith("onednn"):
        model = _reorder_all(model, inside)
    if native:
        return (lambda: model(inside)), (lambda: model(inside).float().contiguous())
    if not last and not bf16:
        return (lambda: model(x)), (lambda: model(x))
    form = torch.channels_last if last else torch.contiguous_format

    def call_inside() -> Tensor:
        y = model(x.to(dtype=dtype, memory_format=form))
        return y.to(dtype=torch.float32, memory_format=torch.contiguous_format)

    return call_inside, call_inside


def check(name: str, got: Tensor, want: Tensor, dtype: str) -> float:
    """The relative difference in norm. Raises RuntimeError where it is too large (or not a number)."""
    error = float((got - want).norm() / want.norm())
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(f"{name}: output differs by {error:.2g} in norm, wanted at most {TOLERANCE[dtype]}")
    return error


def build(
    net: nn.Module,
    x: Tensor,
    dtype: str = "f32",
    threads: int = 1,
    only: Sequence[str] | None = None,
    native: bool = False,
) -> Peers:
    """All peers of the class `dtype` (or those named in `only`), their outputs compared with eager f32.

    Sets torch's thread count and ends what was compiled by an earlier build. Raises RuntimeError where an output is
    wrong: a benchmark of a wrong answer is none.
    """
    import torch._dynamo

    torch.set_num_threads(threads)
    # Dynamo counts the compilations of nn.Sequential's forward and stops at eight.
    torch._dynamo.reset()
    peers = Peers()
    names = [n for n in NAMES[dtype] if only is None or n in only]
    names += [n for n in NATIVE[dtype] if native and (only is None or n in only)]
    with torch.no_grad():
        want = net(x).contiguous()
        folded = fold_batchnorm(net)
        for name in names:
            # NaN, so that an output nobody wrote is seen.
            y = torch.full_like(want, float("nan"))
            try:
                call, output = _make(name, net, folded, x, y, threads)
                call()
            except ImportError as error:
                peers.absent[name] = f"not installed ({error.name})"
                continue
            except Exception as error:
                peers.absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
                continue
            got = output()
            peers.errors[name] = check(name, got, want, dtype)
            (peers.native if name.endswith("_native") else peers.calls)[name] = call
    for package in ("torch", "openvino", "onnxruntime"):
        try:
            peers.versions[package] = __import__(package).__version__
        except ImportError:
            continue
    return peers
