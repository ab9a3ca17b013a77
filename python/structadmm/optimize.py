"""A network as this machine runs it fastest: in segments of the compiled runtime, or as torch runs it.

`optimize` groups what the runtime holds into segments, measures layers and whole candidates in turns (timing.py), and
keeps what is faster by more than the noise. Decisions are kept per machine (decisions.py); the result is verified.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import __version__, forms, ops, segments
from .artefact import is_optimized
from .compact import preserve_report
from .copies import clone, hollow
from .decisions import Decisions, cpu_model
from .errors import ArtefactError, OptimizeError
from .manifest import structure
from .nn import CompactConv2d, CompactLinear
from .paths import render, tolerance_for
from .timing import Timings, interleave
from .trace import Traced, rebatch, tensors_in, trace

SEGMENTS = "segments"  # the candidate that is kept unless another is faster by more than the noise
# Medians of interleaved rounds repeat within a hundredth on a quiet machine; less than that is no reason to change.
NOISE = 0.01
# Largest error of bfloat16 that is accepted, relative to the output in the 2-norm: 2^-9 per rounding, some twenty
# roundings deep, with a margin of three.
BF16_ERROR = 0.1
# Elements left, of the weights that the taps hold, below which single weights are tried.
_NONZEROS = 0.5
# Density of the taps above which a 3x3 convolution may run faster by Winograd's algorithm, for which all are there.
_WINOGRAD = 0.3
# Instruction sets on which the runtime may take it in bf16, by its own estimate.
_WINOGRAD_BF16 = ("avx512", "avx512_bf16")


@dataclass
class LayerChoice:
    """One convolution or linear layer: what was measured for it alone, seconds per call at the example's batch size,
    and what runs it. density: stored weights of the dense layer's; nonzero: those that are not zero."""

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    nonzero: float
    runs_on: str = "torch"
    family: str = ""
    why: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class OptimizeReport:
    """What optimize decided and from what.

    choice: the candidate taken; candidates: name -> median, q1, q3 seconds of the whole network (empty where nothing
    was measured). segments: nodes of each. left: node that no segment holds -> reason. cached: the figures are those of
    an earlier call. max_abs_diff, max_rel_diff: largest difference from the network given, on the example and another
    batch size, and relative to its largest output; error: relative in the 2-norm.
    """

    choice: str
    dtype: str
    threads: int
    isa: str
    cpu: str
    layers: list[LayerChoice]
    candidates: dict[str, dict[str, float]] = field(default_factory=dict)
    segments: list[int] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    cached: bool = False
    max_abs_diff: float | None = None
    max_rel_diff: float | None = None
    error: float | None = None

    @property
    def speed_up(self) -> float | None:
        """Median time of the fastest form of torch over that of the choice."""
        torch_forms = [t["median"] for name, t in self.candidates.items() if not name.startswith(SEGMENTS)]
        if not torch_forms or self.choice not in self.candidates:
            return None
        return min(torch_forms) / self.candidates[self.choice]["median"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"speed_up": self.speed_up}

    def __str__(self) -> str:
        rows: list[Sequence[str]]

        def us(layer: LayerChoice, ours: bool) -> str:
            times = [t for n, t in layer.seconds.items() if n.startswith(SEGMENTS) == ours]
            return f"{1e6 * min(times):.1f}" if times else ""

        rows = [
            (
                r.name,
                r.kind,
                "x".join(map(str, r.shape)),
                f"{r.density:.1%}",
                us(r, True),
                us(r, False),
                r.runs_on + (f" ({r.family})" if r.family else ""),
                r.why,
            )
            for r in self.layers
        ]
        head = ("layer", "kind", "weight", "stored", "ours, us", "torch, us", "runs on", "")
        text = render(f"Optimised for {self.dtype}, {self.threads} threads, {self.isa}", head, rows)
        if self.candidates:
            best = min(t["median"] for t in self.candidates.values())
            rows = [
                (
                    name + (" *" if name == self.choice else ""),
                    *(f"{1e3 * t[k]:.3f}" for k in ("median", "q1", "q3")),
                    f"{t['median'] / best:.2f}",
                )
                for name, t in sorted(self.candidates.items(), key=lambda item: item[1]["median"])
            ]
            text += render("The whole network", ("candidate", "ms", "q1", "q3", "of the fastest"), rows)
        lines = [f"{name} left to torch: {why}" for name, why in self.left.items()] + self.remarks
        if self.cached:
            lines.append("figures of an earlier call on this machine")
        if self.max_abs_diff is not None:
            lines.append(
                f"largest difference from the network given: {self.max_abs_diff:.3g}, {self.max_rel_diff:.3g} of the "
                f"largest output; in the 2-norm {self.error:.3g}"
            )
        return text + "".join(line + "\n" for line in lines)


@dataclass
class _Choice:
    """All that makes an optimised network of a normalised one."""

    form: str = SEGMENTS
    families: dict[str, str] = field(default_factory=dict)
    vendor: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.form if not self.vendor else f"{SEGMENTS}, {len(self.vendor)} layers on oneDNN"


def optimize(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    dtype: torch.dtype | None = None,
    *,
    threads: int | None = None,
    budget: float = 10.0,
    compile: bool = False,
    tolerance: float | None = None,
    report: bool = True,
) -> fx.GraphModule:
    """`model` for inference on this machine's CPU, as fast as it is known to run.

    model: in eval mode, compacted or dense; it is left as it is. example: a tensor or a tuple of tensors as the model
    takes them, batch first: candidates are measured at its batch size, the result takes any.
    dtype: of the values inside; None: the model's own; torch.bfloat16: inputs and outputs stay as they are.
    threads: to measure with; None: torch's own number. budget: seconds to measure for, about; 0: nothing is measured.
    compile: also measure torch.compile with freezing, which wants a C++ compiler and takes a minute.
    tolerance: largest difference allowed, times the larger of 1 and the largest output (float32: 1e-4; bfloat16: a
    tenth of the output in the 2-norm). report: print the table.

    Returns a torch.fx.GraphModule for inference: under torch.compile(fullgraph=True), torch.export (batch dynamic) and
    AOTInductor too. It copies, pickles, and is saved by `save`. `result.report` is an OptimizeReport.

    Raises OptimizeError: the model is in training mode, its outputs are not finite, or nothing computes what it does;
    TraceError: it cannot be traced. Warns of a candidate that computes something else, and leaves it out.
    """
    # Containers say nothing: those that torch.fx makes are in training mode whatever is in them.
    if model.training or any(
        m.training for m in model.modules() if next(m.parameters(recurse=False), None) is not None
    ):
        raise OptimizeError("optimize: model is in training mode, wanted eval()")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise OptimizeError(f"optimize: dtype got {dtype}, wanted None, torch.float32 or torch.bfloat16")
    if isinstance(model, fx.GraphModule) and is_optimized(model):
        model = segments.inline(model)[0]
    work = _Work(model, example, dtype, tolerance)
    with set_threads(threads) as used:
        decisions = Decisions(machine(used))
        choice, result = work.decide(decisions, budget, compile)
        decisions.save()
    result.threads, result.isa, result.cpu = used, ops.isa(), cpu_model()
    fast = work.fast(choice)
    preserve_report(fast, result)
    about = dict(model.meta.get("structadmm", {})) if isinstance(model, fx.GraphModule) else {}
    about.setdefault("inputs", [((None, *t.shape[1:]), t.dtype) for t in work.traced.inputs])
    about.setdefault("original", work.original)
    before = getattr(model, "report", None)
    if callable(to_dict := getattr(before, "to_dict", None)):
        about["metadata"] = {"report": to_dict(), **about.get("metadata", {})}
    fast.meta["structadmm"] = about
    if report:
        print(str(result), end="")
    return fast


def in_segments(
    model: nn.Module, example: Tensor | Sequence[Tensor], dtype: torch.dtype | None = None
) -> fx.GraphModule:
    """`model` with all that the runtime holds in segments: nothing is measured, compared or kept. Raises as optimize
    does."""
    work = _Work(model, example, dtype, None)
    work.refuse()
    return work.fast(_Choice())


def machine(threads: int) -> str:
    """What figures depend on besides the network, for Decisions."""
    return f"{cpu_model()}, {ops.isa()}, {threads} threads, torch {torch.__version__}, structadmm {__version__}"


@contextmanager
def set_threads(n: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


class _Work:
    """One call of optimize: the normalised network, its layers, and the candidates that were built."""

    def __init__(self, model: nn.Module, example: Any, dtype: torch.dtype | None, tolerance: float | None) -> None:
        self.traced: Traced = trace(model, example, "optimize")
        self.original = hollow(self.traced.module)
        segments.normalise(self.traced)
        self.network, self.shapes = self.traced.module, self.traced.shapes
        self.network.requires_grad_(False)
        for node in self.network.graph.nodes:
            node.meta["shape"] = self.shapes.get(node)
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.dtype = dtype or own
        self.cast = None if self.dtype is own else self.dtype
        self.limit = tolerance if tolerance is not None else None if self.cast else tolerance_for(model, None)
        self.inside = segments.DTYPES.get(self.dtype)
        self.remarks = [note for note in self.traced.notes if "hooks" not in note]
        self.probes = [self.traced.inputs]
        if self.traced.batch != (self.traced.inputs[0].shape[0] if self.traced.inputs[0].dim() else 1):
            self.probes.append(rebatch(self.traced.inputs, self.traced.batch, seed=0))
        self.wanted = [self._outputs(clone(model).eval(), probe) for probe in self.probes]
        if not all(torch.isfinite(t).all() for out in self.wanted for t in out if t.is_floating_point()):
            raise OptimizeError("optimize: model got outputs that are NaN or infinite, wanted finite ones")
        self.refused: dict[fx.Node, str] = {}  # by the runtime itself
        self.built: dict[str, fx.GraphModule] = {}
        self.differences: dict[str, tuple[float, float, float]] = {}
        self.layers = self._layers()

    @staticmethod
    def _outputs(module: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return tensors_in(module(*(t.clone() for t in inputs)))

    # What the runtime holds.

    def why_not(self, node: fx.Node, root: fx.GraphModule, shapes: Mapping[fx.Node, Any]) -> str | None:
        if self.inside is None:
            return f"dtype got {self.dtype}, wanted float32 or bfloat16"
        return self.refused.get(node) or segments.why_not(node, root, shapes, self.traced.batch)

    def groups(
        self, network: fx.GraphModule, shapes: Mapping[fx.Node, Any]
    ) -> tuple[list[list[fx.Node]], dict[fx.Node, str]]:
        """The segments of a network, and the nodes outside with the reasons."""
        left, held = {}, []
        for node in network.graph.nodes:
            if node.op in ("call_module", "call_function", "call_method"):
                why = self.why_not(node, network, shapes)
                if why is None:
                    held.append(node)
                else:
                    left[node] = why
        return [g for g in segments.partition(network.graph, held) if segments.pays(g, network)], left

    def refuse(self) -> None:
        """Ask the runtime for what it cannot hold after all."""
        for _ in range(len(self.network.graph.nodes)):
            groups, _ = self.groups(self.network, self.shapes)
            fresh = segments.refusals(self.network, groups, self.shapes)
            if not fresh:
                return
            self.refused.update(fresh)

    # Candidates.

    def fast(self, choice: _Choice) -> fx.GraphModule:
        """The network that a choice describes."""
        key = json.dumps(asdict(choice), sort_keys=True)
        if key not in self.built:
            self.built[key] = self._make(choice)
        return self.built[key]

    def _make(self, choice: _Choice) -> fx.GraphModule:
        if choice.form != SEGMENTS:
            return forms.make(self.network, choice.form, self.cast)
        network, shapes = self.network, self.shapes
        if choice.vendor:
            network = copy.deepcopy(self.network)
            pairs = list(zip(self.network.graph.nodes, network.graph.nodes, strict=True))
            shapes = {new: self.shapes[old] for old, new in pairs if old in self.shapes}
            refused = {new: self.refused[old] for old, new in pairs if old in self.refused}
            for node, shape in shapes.items():
                node.meta["shape"] = shape
            self.refused.update(refused)
            chosen = set(choice.vendor)
            forms.densify(network, chosen)
            forms.fold_norms(network, chosen)
            forms.use_vendor(network, {name: None for name in chosen})
        assert self.inside is not None
        groups, _ = self.groups(network, shapes)
        return segments.lower(network, groups, shapes, self.inside, choice.families)

    def sound(self, choice: _Choice) -> bool:
        """Whether the candidate computes what the model does, on the example and another batch size."""
        try:
            fast = self.fast(choice)
            worst, scale, squares, total = 0.0, 0.0, 0.0, 0.0
            for probe, wanted in zip(self.probes, self.wanted, strict=True):
                got = self._outputs(fast, probe)
                if [t.shape for t in got] != [t.shape for t in wanted] or [t.dtype for t in got] != [
                    t.dtype for t in wanted
                ]:
                    raise OptimizeError("outputs of other shapes")
                for a, b in zip(got, wanted, strict=True):
                    if not a.numel():
                        continue
                    gap = (a.double() - b.double()).abs()
                    largest = gap.max().item()
                    worst = largest if not largest <= worst else worst  # NaN is the worst of all
                    scale = max(scale, b.double().abs().max().item())
                    squares, total = squares + gap.square().sum().item(), total + b.double().square().sum().item()
        except (RuntimeError, ValueError) as e:
            return self._drop(choice, " ".join(str(e).split()))
        error = math.sqrt(squares / total) if total else math.sqrt(squares)
        self.differences[choice.name] = (worst, worst / scale if scale else worst, error)
        fits = worst <= self.limit * max(1.0, scale) if self.limit is not None else error <= BF16_ERROR
        if not fits:
            how = f"{worst:.3g} of outputs up to {scale:.3g}, in the 2-norm {error:.3g}"
            return self._drop(choice, f"outputs that differ by {how}")
        return True

    def _drop(self, choice: _Choice, why: str) -> bool:
        text = f"{choice.name} got {why}; it is left out"
        warnings.warn(f"optimize: {text}", stacklevel=6)
        self.remarks.append(text)
        return False

    # Layers one by one.

    def _layers(self) -> list[LayerChoice]:
        rows = []
        for name in dict.fromkeys(n.target for n in self.network.graph.nodes if n.op == "call_module"):
            m: Any = self.network.get_submodule(str(name))
            if isinstance(m, (nn.Conv2d, nn.Linear, CompactConv2d, CompactLinear)):
                dense: Tensor = m.weight if isinstance(m, (nn.Conv2d, nn.Linear)) else m.dense_weight()
                stored, full = m.weight.numel(), dense.numel()
                nonzero = int(torch.count_nonzero(m.weight))
                rows.append(LayerChoice(name, type(m).__name__, tuple(dense.shape), stored / full, nonzero / full))
        return rows

    def _nodes_of(self) -> dict[str, fx.Node]:
        return {str(n.target): n for n in self.network.graph.nodes if n.op == "call_module"}

    def _signature(self, row: LayerChoice, m: Any, x: Sequence[int]) -> str:
        sizes = [getattr(m, k, "") for k in ("stride", "padding", "dilation", "groups")]
        blocks = m.block_filters.numel() if hasattr(m, "block_filters") else 0
        return (
            f"{row.kind} {list(row.shape)} {sizes} of {list(x)}, {self.dtype}, bias {m.bias is not None}, stored "
            f"{row.density:.2f}, nonzero {row.nonzero:.2f}, blocks {blocks}"
        )

    def measure_layers(self, decisions: Decisions, budget: float) -> None:
        """Fill the rows' seconds, from the cache where it has them."""
        nodes = self._nodes_of()
        batch = self.traced.inputs[0].shape[0] if self.traced.inputs[0].dim() else 1
        waiting: dict[str, tuple[LayerChoice, Any, list[int]]] = {}
        signatures = {}
        for row in self.layers:
            node = nodes[row.name]
            why = self.why_not(node, self.network, self.shapes)
            if why is not None:
                row.why = why
                continue
            m = self.network.get_submodule(row.name)
            x = [batch, *self.shapes[node.all_input_nodes[0]][1:]]
            signatures[row.name] = key = self._signature(row, m, x)
            known = decisions.get("layers", key)
            if known is not None and known and all(isinstance(t, float) and 0 < t < 1e6 for t in known.values()):
                row.seconds = dict(known)
            else:
                waiting.setdefault(key, (row, m, x))
        if budget <= 0:
            return
        began = perf_counter()
        for key, (row, m, x) in waiting.items():
            if perf_counter() - began > 2 * budget:
                break  # a busy machine: the layers left out count as measured by none, and stay in their segments
            calls = self._layer_calls(row, m, torch.randn(x, dtype=self._io()))
            if calls:
                each = budget / len(waiting) / len(calls)
                decisions.put("layers", key, {n: t.median for n, t in _spreads(_interleave(calls, each)).items()})
        for row in self.layers:
            if row.name in signatures:
                row.seconds = dict(decisions.get("layers", signatures[row.name]) or {})

    def _io(self) -> torch.dtype:
        return next((t.dtype for t in self.traced.inputs if t.is_floating_point()), torch.float32)

    def _layer_calls(self, row: LayerChoice, m: Any, x: Tensor) -> dict[str, Callable[[], object]]:
        """The layer alone: as a segment in each family that may suit, and as torch runs it."""
        assert self.inside is not None
        graph = fx.Graph()
        inner = graph.placeholder("x")
        node = graph.call_module("layer", (inner,))
        graph.output(node)
        root = nn.Module()
        root.add_module("layer", m)
        alone = fx.GraphModule(root, graph, "Layer")
        with torch.no_grad():
            y = m(x.to(m.weight.dtype))
        shapes = {inner: x.shape, node: y.shape}
        calls: dict[str, Callable[[], object]] = {}
        for family in _families(row, m, self.dtype):
            made = segments.lower(alone, [[node]], shapes, self.inside, {"layer": family} if family else {})
            segment: Any = made.segment_0
            try:
                with torch.no_grad():
                    segment(x)
            except (RuntimeError, ValueError):
                continue  # the family cannot run it
            calls[f"{SEGMENTS} {family}".strip()] = lambda s=segment: s(x)  # type: ignore[misc]
        dense = m.to_dense() if hasattr(m, "to_dense") else copy.deepcopy(m)
        dense = dense.requires_grad_(False).to(self.dtype).eval()
        inner_x = x.to(self.dtype)
        if isinstance(dense, nn.Linear):
            calls["linear"] = lambda: dense(inner_x)
            return calls
        last = inner_x.contiguous(memory_format=torch.channels_last)
        calls["nchw"] = lambda: dense(inner_x)
        if type(dense) is nn.Conv2d and not isinstance(dense.padding, str) and torch.backends.mkldnn.is_available():
            vendor = forms.VendorConv2d.of(dense)
            calls |= {"onednn": lambda: vendor(inner_x), "onednn channels-last": lambda: vendor(last)}
        return calls

    # The decision.

    def decide(self, decisions: Decisions, budget: float, compiled: bool) -> tuple[_Choice, OptimizeReport]:
        times: dict[str, dict[str, float]]
        self.refuse()
        groups, left = self.groups(self.network, self.shapes)
        key = self._key(compiled)
        known = self._cached(decisions, key)
        self.measure_layers(decisions, 0.0 if known else budget / 2)
        if known is not None:
            choice, times = known
            if self.sound(choice):
                return choice, self._report(choice, times, groups, left, cached=True)
        candidates = self._candidates(groups, compiled)
        choice, times = candidates[0], {}
        if budget > 0 and len(candidates) > 1:
            timings = _race({c.name: self.fast(c) for c in candidates}, self.traced.inputs, budget / 2)
            choice = next(c for c in candidates if c.name == _pick(timings))
            times = {name: t.to_dict() for name, t in _spreads(timings).items()}
            decisions.put("networks", key, {"choice": asdict(choice), "seconds": times})
        return choice, self._report(choice, times, groups, left, cached=False)

    def _candidates(self, groups: Sequence[Any], compiled: bool) -> list[_Choice]:
        """Sound ones, the preferred first."""
        out = []
        if groups:
            families = {r.name: f for r in self.layers if (f := _family(r))}
            out.append(_Choice(families=families))
            slow = [r.name for r in self.layers if _vendor_gain(r, 0.0) > NOISE]
            alone = [r.name for r in self.layers if _vendor_gain(r, 1.0) > NOISE]
            for names in (slow, alone):
                choice = _Choice(families=families, vendor=names)
                if names and choice not in out:
                    out.append(choice)
        names = [n for n in forms.FORMS if self.inside is not None or not n.startswith("onednn")]
        names += [forms.COMPILED] if compiled else []
        if all(not hasattr(m, "to_dense") for m in self.network.modules()):
            names.remove("given")  # what folded is, with more to do
        elif self.cast is not None:
            names.remove("given")  # compacted layers have kernels in float32 alone
        out = [c for c in (*out, *map(_Choice, names)) if self.sound(c)]
        if not out:
            raise OptimizeError("optimize: every candidate got other outputs than the model, wanted one that has them")
        return out

    def _key(self, compiled: bool) -> str:
        try:
            spec: Any = structure(self.network)
        except ArtefactError:  # an operation that no file holds: known by how it prints
            spec = str(self.network.graph)
        rows = [(r.name, r.shape, round(r.density, 2), round(r.nonzero, 2)) for r in self.layers]
        inputs = [(list(t.shape), str(t.dtype)) for t in self.traced.inputs]
        text = json.dumps([spec, rows, inputs, str(self.dtype), compiled], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _cached(self, decisions: Decisions, key: str) -> tuple[_Choice, dict[str, dict[str, float]]] | None:
        """The choice of an earlier call, if it makes sense here."""
        entry = decisions.get("networks", key)
        try:
            assert entry is not None
            choice = _Choice(**entry["choice"])
            times = {str(n): {k: float(t[k]) for k in ("median", "q1", "q3")} for n, t in entry["seconds"].items()}
            layers = {r.name for r in self.layers}
            assert choice.form in (SEGMENTS, *forms.FORMS, forms.COMPILED) and choice.name in times
            assert set(choice.vendor) | set(choice.families) <= layers
            assert all(isinstance(f, str) for f in choice.families.values())
        except (AssertionError, TypeError, KeyError, ValueError, AttributeError):
            return None
        return choice, times

    def _report(
        self,
        choice: _Choice,
        times: dict[str, dict[str, float]],
        groups: Sequence[Sequence[fx.Node]],
        left: Mapping[fx.Node, str],
        cached: bool,
    ) -> OptimizeReport:
        inside = {str(n.target) for g in groups for n in g if n.op == "call_module"}
        for row in self.layers:
            if choice.form != SEGMENTS:
                row.runs_on = f"torch, {choice.form}"
            elif row.name in choice.vendor:
                row.runs_on = "oneDNN"
            elif row.name in inside:
                row.runs_on, row.family = "segment", choice.families.get(row.name, "")
        fast = self.fast(choice)
        sizes = [sum(n.op not in ("placeholder", "output") for n in s.network().graph.nodes)
                 for s in segments.segments_of(fast).values()]  # fmt: skip
        shown = left if choice.form == SEGMENTS else {}
        named = {n.name if n.op != "call_module" else str(n.target): why for n, why in shown.items()}
        worst, relative, error = self.differences[choice.name]
        return OptimizeReport(
            choice.name,
            str(self.dtype).removeprefix("torch."),
            *(0, "", ""),
            copy.deepcopy(self.layers),
            times,
            sizes,
            named,
            list(self.remarks),
            cached,
            worst,
            relative,
            error,
        )


def _families(row: LayerChoice, m: Any, dtype: torch.dtype) -> list[str]:
    """Families worth trying; "" lets the runtime choose."""
    if not isinstance(m, (nn.Conv2d, CompactConv2d)):
        return [""]
    if m.groups == m.in_channels and m.groups > 1:
        return ["", "taps"]
    if row.nonzero < _NONZEROS * row.density:
        return ["", "nonzeros"]
    squares = m.kernel_size == (3, 3) and m.stride == m.dilation == (1, 1) and m.groups == 1
    if not squares or row.density <= _WINOGRAD:
        return [""]
    if dtype == torch.float32:
        return ["", "taps", "winograd"]
    return ["", "taps"] if ops.isa() in _WINOGRAD_BF16 else [""]


def _family(row: LayerChoice) -> str:
    """The family that is faster than the runtime's own choice by more than the noise, or ""."""
    ours = {n.partition(" ")[2]: t for n, t in row.seconds.items() if n.split(" ")[0] == SEGMENTS}
    if "" not in ours:
        return ""
    best = min(ours, key=lambda f: ours[f])
    return best if ours[best] < (1 - 3 * NOISE) * ours[""] else ""


def _vendor_gain(row: LayerChoice, split: float) -> float:
    """How much faster the vendor's op is than ours for the layer alone, as a share of ours.

    Ours alone reads and writes tensors as a split segment has to, so split = 1 is what a segment's end costs; within a
    segment it is spared most of that, so split = 0 names every layer that might gain.
    """
    ours = [t for n, t in row.seconds.items() if n.split(" ")[0] == SEGMENTS]
    theirs = [t for n, t in row.seconds.items() if n.startswith("onednn") or n == "nchw"]
    if not ours or not theirs:
        return 0.0
    return 1 - min(theirs) * (1 + 0.2 * split) / min(ours)


def _interleave(calls: Mapping[str, Callable[[], object]], each: float) -> Timings:
    """Time calls in turns for about `each` seconds a call."""
    repeats = 7
    with torch.inference_mode():
        limit = 1.5 * each * len(calls)
        return interleave(calls, warmup=each * 0.3, repeats=repeats, min_time=each * 0.7 / repeats, limit=limit)


def _spreads(timings: Timings) -> dict[str, Any]:
    return {name: timings[name] for name in timings.rounds}


def _race(networks: Mapping[str, Callable[..., Any]], inputs: Sequence[Tensor], budget: float) -> Timings:
    """Times of the candidates in turns; those far behind after a first lap stop there."""
    calls = {name: (lambda f=f: f(*inputs)) for name, f in networks.items()}
    first = _interleave(calls, budget * 0.3 / len(calls))
    best = first[first.fastest()].median
    near = {n: c for n, c in calls.items() if first[n].median < 1.3 * best or n == SEGMENTS}
    second = _interleave(near, budget * 0.7 / len(near))
    return Timings({**first.rounds, **second.rounds}, {**first.calls, **second.calls})


def _pick(timings: Timings) -> str:
    """The fastest, if it is faster than the segments by more than the noise."""
    best = timings.fastest()
    if SEGMENTS not in timings.rounds or best == SEGMENTS:
        return best
    gain = timings.ratio(SEGMENTS, best) if len(timings.rounds[best]) == len(timings.rounds[SEGMENTS]) else None
    return best if gain is None or (gain.median > 1 + NOISE and gain.q1 > 1) else SEGMENTS
