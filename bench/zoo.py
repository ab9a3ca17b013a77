"""Does compaction hold on the networks that people use? torchvision's models and timm's families.

    PYTHONPATH=python python bench/zoo.py [--set torchvision|timm|dense|decoder|all] [--rates 0.3 0.7] [--part 0/2]
                                          [--only NAME...] [--seconds N] [--failed] [--again]

Every model gets random weights, and in every layer a share of filters and of columns set to zero; then it is compacted
and compared with the masked model at another batch size, all outputs, relative to the largest value of each: within
1e-4 in float32 and 1e-10 in float64. The small network is saved and loaded and trained for a step; no filter of it may
be without effect unless the report says why; compacting it again removes nothing. `seconds_graph` is the processor time
of trace, analysis and layout. The set "dense" is networks for segmentation, detection and video; "decoder" is the graph
of a language model of seven billion parameters, on the meta device.

Results are added to results/zoo.json one by one, models that have one are skipped, so the sweep goes on where it
stopped; each process is single-threaded, and several share the work with --part. In 24 GB of memory the largest fit
where the C library gives back what is freed (MALLOC_MMAP_THRESHOLD_=1048576, with glibc). Needs torchvision and timm;
beside a CPU build of torch they can be installed with --no-deps.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import importlib
import json
import math
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structadmm as sa
from structadmm.analysis import Analysis
from structadmm.files import atomic_write_text
from structadmm.layout import settle
from structadmm.trace import tensors_in, trace

RESULTS = Path(__file__).parent / "results" / "zoo.json"
# One model of each of these families of timm, the smallest or nearly.
TIMM_NAMES = """
resnet18 resnetv2_18d resnext26ts seresnext26d_32x4d ecaresnet26t skresnet18 res2net50_26w_4s resnest14d regnetx_002
regnety_002 regnetz_b16 densenet121 dla34 dpn48b vovnet39a ese_vovnet19b_dw cspresnet50 cspdarknet53 darknet53
hrnet_w18_small mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small mnasnet_050 fbnetc_100 spnasnet_100
efficientnet_b0 efficientnet_lite0 tf_efficientnetv2_b0 mixnet_s ghostnet_050 ghostnetv2_100 hardcorenas_a lcnet_035
tinynet_e rexnet_100 repvgg_a0 repghostnet_050 mobileone_s0 inception_v3 inception_v4 inception_resnet_v2 xception41
nasnetalarge pnasnet5large selecsls42b vgg11 vgg11_bn gernet_s convnext_atto convnextv2_atto convmixer_768_32
edgenext_xx_small hgnetv2_b0 fasternet_t0 inception_next_atto starnet_s1 vit_tiny_patch16_224 deit_tiny_patch16_224
deit3_small_patch16_224 cait_xxs24_224 beit_base_patch16_224 eva02_tiny_patch14_224 swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 mixer_s32_224 resmlp_12_224 gmixer_24_224 gmlp_ti16_224 coat_tiny coatnet_nano_rw_224
maxvit_tiny_tf_224 crossvit_tiny_240 levit_128s pit_ti_224 poolformer_s12 caformer_s18 convformer_s18 pvt_v2_b0
twins_pcpvt_small twins_svt_small tnt_s_patch16_224 visformer_tiny volo_d1_224 xcit_nano_12_p16_224 mobilevit_xxs
mobilevitv2_050 efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 fastvit_t8 focalnet_tiny_srf
davit_tiny gcvit_xxtiny nest_tiny sequencer2d_s tiny_vit_5m_224 repvit_m0_9 hiera_tiny_224 mvitv2_tiny nextvit_small
rdnet_tiny shvit_s1 swiftformer_xs tresnet_m vitamin_small_224 bat_resnext26ts botnet26t_256 halonet26t
lambda_resnet26t lamhalobotnet50ts_256 mambaout_femto
"""
TIMM = [name for line in TIMM_NAMES.splitlines() for name in line.split()]


def torchvision() -> Any:
    """The module; without its compiled operators, which a CPU build of torch can't load."""
    try:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision.library = library  # type: ignore[attr-defined]
    except RuntimeError:
        pass  # defined already
    import torchvision as module

    return module


DENSE = (
    *("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large"),
    *("lraspp_mobilenet_v3_large", "resnet18_fpn", "resnet50_fpn", "mobilenet_v3_large_fpn"),
    *("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b"),
)
DECODERS = ("decoder_7b", "decoder_7b_grouped")


def names(which: str) -> list[str]:
    found = []
    if which in ("decoder", "all"):
        found += [f"meta/{n}" for n in DECODERS]
    vision = torchvision()
    if which in ("torchvision", "all"):
        found += [f"torchvision/{n}" for n in vision.models.list_models(module=vision.models)]
    if which in ("timm", "all"):
        found += [f"timm/{n}" for n in TIMM]
    if which in ("dense", "all"):
        found += [f"dense/{n}" for n in DENSE]
    return found


def dense(short: str) -> tuple[nn.Module, list[tuple[int, ...]]]:
    """A model for segmentation, detection or video, and shapes to try."""
    vision = torchvision()
    if short.endswith("_fpn"):
        from torchvision.models.detection import backbone_utils

        make = backbone_utils.mobilenet_backbone if "mobilenet" in short else backbone_utils.resnet_fpn_backbone
        options = {"fpn": True} if "mobilenet" in short else {}
        return make(backbone_name=short.removesuffix("_fpn"), weights=None, **options), [(3, 64, 64)]
    if short in vision.models.list_models(module=vision.models.segmentation):
        return vision.models.get_model(short, weights=None, weights_backbone=None), [(3, 64, 64)]
    model = vision.models.get_model(short, weights=None)
    return model, [(3, 16, 224, 224)] if short.startswith("mvit") else [
        (3, 8, 64, 64),
        (3, 16, 64, 64),
        (3, 16, 224, 224),
    ]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The model with random weights, and the smallest input that it was found to take."""
    source, _, short = name.partition("/")
    vision = torchvision()
    shapes: list[tuple[int, ...]] = []
    size = 64
    if source == "dense":
        model, shapes = dense(short)
    elif source == "timm":
        import timm

        model = timm.create_model(short, pretrained=False)
        if model.default_cfg.get("fixed_input_size", False):
            size = model.default_cfg.get("input_size", (3, 224, 224))[-1]
    else:
        options: dict[str, Any] = {}
        if short.startswith("vit_"):
            size = int(short.split("_")[-1]) * 4
            options = {"image_size": size}
        elif short.startswith("maxvit"):
            size, options = 224, {}
        elif short.startswith("inception"):
            size = 96
        elif "swin_v2" in short:
            size = 64
        if short.startswith(("inception", "googlenet")):
            options |= {"aux_logits": False, "init_weights": False}
            make = getattr(vision.models, short)
            model = make(weights=None, **options)
        else:
            model = vision.models.get_model(short, weights=None, **options)
    model.eval()
    if not shapes:
        sizes = sorted({size, 96, 128, 224, 256}) if size <= 96 else [size]
        shapes = [(3, s, s) for s in sizes if s >= size]
    for shape in shapes:
        x = torch.randn(2, *shape)
        try:
            with torch.no_grad():
                model(x)
            return model, x
        except Exception as error:
            last = error
    raise last


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(model(x))


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference over all outputs, each relative to its largest value."""
    if [t.shape for t in a] != [t.shape for t in b]:
        raise AssertionError(f"outputs of shapes {[tuple(t.shape) for t in b]}, wanted {[tuple(t.shape) for t in a]}")
    found = [((s - t).abs().max() / s.abs().max()).item() for s, t in zip(a, b, strict=True)]
    if not all(map(math.isfinite, found)):
        raise AssertionError(f"differences of {found}: outputs that are zero or not finite")
    return float(f"{max(found):.3g}")


def parameters(m: nn.Module) -> int:
    return sum(p.numel() for p in m.parameters())


@contextlib.contextmanager
def clocked(*names: str) -> Iterator[dict[str, float]]:
    """Seconds of processor time that `compact` spends in these functions."""
    module: Any = importlib.import_module("structadmm.compact")
    spent = dict.fromkeys(names, 0.0)
    before = {name: getattr(module, name) for name in names}

    def wrap(name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            out = before[name](*args, **kwargs)
            spent[name] += time.process_time() - began
            return out

        return run

    for name in names:
        setattr(module, name, wrap(name))
    try:
        yield spent
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def compacted(model: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sa.compact(model, x, columns="never", verify=False)


def judge(name: str, rate: float) -> dict[str, Any]:
    """One row of the results: what went, and the first check that failed."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"ok": False}
    started = time.monotonic()
    stage = "build"
    try:
        model, x = build(name)
        row["input"] = list(x.shape[1:])
        fill(model)
        fresh = torch.randn(3, *x.shape[1:], generator=torch.Generator().manual_seed(2))
        for seed in range(1, 9):  # the zeros of some seeds leave no way through a narrow network
            zeros_at_random(model, rate, seed)
            calibrate(model, x)
            single = outputs(model.eval(), fresh)
            row |= {"seed": seed, "signal": signal(single)}
            if row["signal"] >= 1e-4:
                break
        else:
            raise AssertionError(f"outputs vary by {row['signal']} of their largest value, too little to compare")
        stage = "compact"
        with clocked("trace", "Analysis", "settle") as spent:
            small = compacted(model, x)
        row["seconds_graph"] = round(sum(spent.values()), 2)
        row |= {"parameters": parameters(model), "parameters_after": parameters(small), "nonzero": nonzeros(model)}
        row["whole"] = reasons(small)
        stage = "compare in float32"
        y = outputs(small.eval(), fresh)
        row["float32"] = difference(single, y)

        stage = "save and load"
        try:
            with tempfile.TemporaryDirectory() as folder:
                sa.save(small, Path(folder) / "net.safetensors")
                loaded = sa.load(Path(folder) / "net.safetensors")
            row["saved"] = "structadmm"
        except sa.ArtefactError as error:  # an operation that the file format does not hold: torch's own pickle
            row["saved"], row["not_saved"] = "torch", re.sub(r"\S*/site-packages/", "", str(error))[-200:]
            with tempfile.TemporaryFile() as file:
                torch.save(small, file)
                file.seek(0)
                loaded = torch.load(file, weights_only=False)
        if not all(map(torch.equal, outputs(loaded.eval(), fresh), y)):
            raise AssertionError("the loaded network gives other outputs")
        del loaded

        stage = "train"
        small.train()
        optimizer = torch.optim.SGD(small.parameters(), 1e-3)
        total(tensors_in(small(fresh))).backward()
        optimizer.step()
        if not any(p.grad is not None and bool(p.grad.any()) for p in small.parameters()):
            raise AssertionError("no gradient")
        del small, optimizer

        stage = "compare in float64"
        exact, x, fresh = model.double(), x.double(), fresh.double()
        a = outputs(exact, fresh)
        row["rounding"] = difference(a, [t.double() for t in single])
        small = compacted(exact, x)
        row["float64"] = difference(a, outputs(small.eval(), fresh))
        if not row["float64"] <= 1e-10:
            raise AssertionError(f"differs by {row['float64']} of the largest output in float64")
        if not row["float32"] <= 1e-4:
            stage = "compare in float32"
            raise AssertionError(f"differs by {row['float32']} of the largest output, rounding is {row['rounding']}")
        del model, exact  # of the largest, three of the four copies that `leftovers` would make fit in memory
        stage = "what is left"
        row |= leftovers(small, fresh)
        if row["unexplained"]:
            raise AssertionError(f"filters without effect and without a reason: {row['unexplained']}")
        stage = "compact again"
        again = compacted(small, x)
        if parameters(again) != parameters(small):
            raise AssertionError(f"{parameters(small)} parameters become {parameters(again)}")
        row["ok"] = True
    except Exception as error:
        row |= {"stage": stage, "error": f"{type(error).__name__}: {str(error)[:400]}"}
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


class Decoder(nn.Module):
    """Blocks of a Llama-like language model: RMSNorm, attention with shared or own keys and values, SwiGLU."""

    def __init__(self, c: int, hidden: int, heads: int, kv: int, depth: int, words: int) -> None:
        super().__init__()
        self.heads, self.kv, self.size = heads, kv, c // heads
        self.embed, self.blocks = nn.Embedding(words, c), nn.ModuleList()
        for _ in range(depth):
            parts: dict[str, nn.Module] = {"n1": nn.RMSNorm(c), "n2": nn.RMSNorm(c)}
            widths = {"q": (c, c), "k": (c, kv * self.size), "v": (c, kv * self.size), "o": (c, c)}
            widths |= {"gate": (c, hidden), "up": (c, hidden), "down": (hidden, c)}
            self.blocks.append(nn.ModuleDict(parts | {n: nn.Linear(*w, bias=False) for n, w in widths.items()}))
        self.norm, self.head = nn.RMSNorm(c), nn.Linear(c, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for b in self.blocks:
            y = b["n1"](x)
            q, k, v = (b[n](y).unflatten(-1, (-1, self.size)).transpose(1, 2) for n in "qkv")
            if self.kv < self.heads:
                k, v = (t.unsqueeze(2).expand(-1, -1, self.heads // self.kv, -1, -1).flatten(1, 2) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + b["o"](y.transpose(1, 2).flatten(2))
            y = b["n2"](x)
            x = x + b["down"](F.silu(b["gate"](y)) * b["up"](y))
        return self.head(self.norm(x))


def decoder(name: str) -> dict[str, Any]:
    """A row of the graph alone of a decoder on the meta device."""
    started = time.monotonic()
    with torch.device("meta"):
        model = Decoder(4096, 11008, 32, 8 if "grouped" in name else 32, 32, 32000)
        x = torch.zeros(1, 16, dtype=torch.long)
    began = time.process_time()
    traced = trace(model, x, unpacked=True, share=True)
    analysis = Analysis(traced)
    layouts = settle(analysis)
    row = {"seconds_graph": round(time.process_time() - began, 2), "parameters": parameters(model)}
    ok = not layouts.conflicts and not analysis.removed.any()
    row |= {"ok": ok, "whole": dict(Counter(analysis.whole.values()))}
    return row | {"seconds": round(time.monotonic() - started, 1)}


class Smooth(nn.Module):
    """In the place of activations whose derivative is 0 in places, or rounded to 0: a channel then has an effect unless
    no weight carries it on."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.sin(x)


class Gate(nn.Module):
    """In the place of activations that saturate: never 0, as they are factors."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 + F.softsign(x)


_KINKED: dict[type[nn.Module], Any] = {
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardswish, nn.GELU, nn.SiLU), Smooth),
    **dict.fromkeys((nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh), Gate),
}
_KINKED_NAMES = {
    **dict.fromkeys(("relu", "relu_", "relu6", "hardswish", "clamp", "clamp_", "gelu", "silu"), "smooth"),
    **dict.fromkeys(("hardsigmoid", "hardtanh", "sigmoid", "sigmoid_", "tanh"), "gate"),
}


def leftovers(small: Any, x: Tensor) -> dict[str, Any]:
    """Filters that a layer still has and that do nothing, found without the analysis: all weights are zero, or the
    derivative of the outputs by all of them is exactly zero. What the report does not explain is counted by layer."""
    net = copy.deepcopy(small)
    net.add_module("smooth", Smooth())
    net.add_module("gate", Gate())
    for path, m in list(net.named_modules()):
        if type(m) in _KINKED:
            parent, _, last = path.rpartition(".")
            setattr(net.get_submodule(parent), last, _KINKED[type(m)]())
    for node in net.graph.nodes:
        called = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.op in ("call_function", "call_method") and called in _KINKED_NAMES:
            with net.graph.inserting_before(node):
                node.replace_all_uses_with(net.graph.call_module(_KINKED_NAMES[called], node.args[:1]))
            net.graph.erase_node(node)
    net.recompile()
    net.eval().requires_grad_(True)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):  # its statistics are those of the other activations
            m.train()
    total(tensors_in(net(x))).backward()
    idle, beside_whole, unexplained, why = 0, 0, {}, Counter[str]()
    held: dict[str, set[int]] | None = None
    whole = tuple(f"{name}:" for name in small.report.whole)
    for path, m in net.named_modules():
        if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) and path not in small.report.whole:
            by_filter = m.weight.transpose(0, 1) if isinstance(m, nn.modules.conv._ConvTransposeNd) else m.weight
            gradient = torch.zeros_like(m.weight) if m.weight.grad is None else m.weight.grad
            felt = gradient.transpose(0, 1) if by_filter is not m.weight else gradient
            nothing = ~(by_filter != 0).flatten(1).any(1) | ~(felt != 0).flatten(1).any(1)
            notes = small.report.notes.get(path, {})
            idle += int(nothing.sum())
            for reason, n in notes.items():
                why[re.sub(r"\S*\d\S*", "*", reason)[:100]] += n
            if int(nothing.sum()) > sum(notes.values()):
                if held is None:
                    held = held_by_whole(small, x)
                taken = set(nothing.nonzero().flatten().tolist()) & held.get(path, set())
                beside_whole += len(taken)
                rest = [f for f in nothing.nonzero().flatten().tolist() if f not in taken]
                # What is noted for the sake of an operation left whole is among those taken.
                noted = sum(n for reason, n in notes.items() if not reason.startswith(whole))
                if len(rest) > noted and (more := len(without_effect(small, path, rest, x)) - noted) > 0:
                    unexplained[path] = more
    return {
        "idle_filters": idle,
        "beside_whole": beside_whole,
        "idle_because": dict(why.most_common(8)),
        "unexplained": unexplained,
    }


@torch.no_grad()
def without_effect(small: Any, path: str, filters: list[int], x: Tensor) -> list[int]:
    """Those of the filters whose weights can be anything. The derivative above is of another network, with batch
    statistics and smooth activations, in which a channel may also vanish by rounding; this asks the network itself, on
    inputs of several sizes, since activations that clamp are dead for some."""
    m = small.get_submodule(path)
    weight = m.weight.transpose(0, 1) if isinstance(m, nn.modules.conv._ConvTransposeNd) else m.weight
    inputs = [x, 0.1 * x, -8 * x]
    base = [outputs(small, i) for i in inputs]
    found = []
    for f in filters:
        old, moved = weight[f].clone(), False
        if not old.any():  # counts as it is
            found.append(f)
            continue
        for change in (0.3, -3.0):
            weight[f] = old * 1.5 + change
            moved = moved or any(
                not torch.equal(a, b)
                for i, outs in zip(inputs, base, strict=True)
                for a, b in zip(outputs(small, i), outs, strict=True)
            )
        weight[f] = old
        found += [] if moved else [f]
    return found


def held_by_whole(small: Any, x: Tensor) -> dict[str, set[int]]:
    """Layer -> its filters whose very channel an operation that was left whole takes, or one tied to it."""
    analysis = Analysis(trace(small, x, unpacked=True, share=True))
    named = tuple(f"{name}:" for name in analysis.whole)
    ids = [ids for ids, reason in analysis.locks if named and reason.startswith(named)]
    labels = np.unique(analysis.label[np.concatenate(ids)]) if ids else np.zeros(0, int)
    return {
        str(node.target): set(np.flatnonzero(np.isin(analysis.label[layer.outs.ids], labels)).tolist())
        for node, layer in analysis.layers.items()
    }


def total(found: list[Tensor]) -> Tensor:
    """A number that every value of the outputs goes into, each by a factor of its own."""
    g = torch.Generator().manual_seed(3)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in found]
    return torch.stack([(t * w).sum() / t.numel() for t, w in zip(found, weights, strict=True)]).sum()


def signal(found: list[Tensor]) -> float:
    """How much of the outputs depends on the input: the least standard deviation over the batch, relative to the
    largest value. No comparison says much of outputs that do not vary."""
    return float(f"{min((t.std(0).max() / t.abs().max()).item() for t in found):.3g}")


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random values for parameters that begin as constants (layer scales of 1e-6, position tables of 0): untrained,
    whole branches would have no effect on the output."""
    for m in model.modules():
        if not isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.PReLU)):
            for p in m.parameters(recurse=False):
                if p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                    p.normal_(0.0, 0.02) if p.dim() > 1 and not bool(p.any()) else p.uniform_(0.2, 1.0)


@torch.no_grad()
def zeros_at_random(model: nn.Module, rate: float, seed: int) -> None:
    """Random weights, and in every layer a share of about `rate` of filters and of columns set to zero; biases stay, so
    zero filters emit constants. The first of each stays, and the weights make up for what is missing: a network that
    hardly depends on its input would prove nothing."""
    g = torch.Generator().manual_seed(seed)

    def gone(n: int) -> Tensor:
        found = torch.rand(n, generator=g) < rate
        found[0] = False
        return found

    def between(p: Tensor | None, low: float, high: float) -> None:
        if p is not None:
            p.copy_(low + (high - low) * torch.rand(p.shape, generator=g))

    for m in model.modules():
        if isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
            # Mostly above zero: where random units switch with their input, rounding grows by a factor with each layer,
            # a thousandfold over a hundred, and a comparison in float32 sees nothing else.
            between(m.weight, 0.5, 1.0)
            between(m.bias, -0.3, 1.2)
        elif isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)):
            w: Any = m.weight
            w.copy_(torch.randn(w.shape, generator=g) * (2.0 / w[0].numel()) ** 0.5 / (1 - rate))
            between(m.bias, -0.1, 0.5)
            w[gone(w.shape[0])] = 0
            w[:, gone(w.shape[1])] = 0
        elif isinstance(m, nn.MultiheadAttention):
            if m.in_proj_weight is not None:
                m.in_proj_weight[gone(len(m.in_proj_weight))] = 0
            between(m.in_proj_bias, -0.3, 0.3)


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor) -> None:
    """Statistics of the normalisations from one pass, so that values neither vanish nor explode on their way."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momentum = [m.momentum for m in norms]
    for m in norms:
        m.train()
        m.momentum = 1.0
    model(torch.cat([x, x.flip(2), x * 0.5, torch.randn_like(x)]))
    for m, value in zip(norms, momentum, strict=True):
        m.eval()
        m.momentum = value
        # Channels without variance would be blown up by 1/sqrt(eps), with rounding errors.
        if m.running_var is not None:
            m.running_var.clamp_(min=0.05)


def nonzeros(model: nn.Module) -> int:
    return sum(int(torch.count_nonzero(p)) for p in model.parameters())


def reasons(small: Any) -> dict[str, int]:
    """Why operations were left whole -> how many."""
    return dict(Counter(why[:120] for why in small.report.whole.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="all", choices=("torchvision", "timm", "dense", "decoder", "all"))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.7])
    parser.add_argument("--only", nargs="+", default=None, help="names such as timm/resnet18; done again")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no model after this time")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th model, from the i-th")
    parser.add_argument("--again", action="store_true", help="do all again that have no figure of this version")
    parser.add_argument("--failed", action="store_true", help="do those again that failed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    part, parts = map(int, options.part.split("/"))
    started = time.monotonic()
    table: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in (options.only or names(options.set))[part::parts]:
        for rate in [0.0] if name.startswith("meta/") else options.rates:
            key = f"{name} {rate}"
            known = table.get(key)
            redo = options.only or (options.failed and known and not known["ok"])
            if known is not None and not redo and not (options.again and "seconds_graph" not in known):
                continue
            if time.monotonic() - started > options.seconds:
                print("time is up")
                return
            row = decoder(name) if name.startswith("meta/") else judge(name, rate)
            with open(RESULTS.with_suffix(".lock"), "w") as lock:  # another process may have added rows meanwhile
                fcntl.flock(lock, fcntl.LOCK_EX)
                table = {**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), key: row}
                atomic_write_text(RESULTS, json.dumps(dict(sorted(table.items())), indent=1) + "\n")
            shrunk = f"{row.get('parameters', 0):,} -> {row.get('parameters_after', 0):,}"
            verdict = "ok" if row["ok"] else f"{row['stage']}: {row['error']}"
            print(f"{key}: {verdict} {shrunk} {row['seconds']} s", flush=True)
    done = [r for r in table.values() if r["ok"]]
    print(f"{len(done)} of {len(table)} pass")


if __name__ == "__main__":
    main()
