"""Optimised networks: the same function in every form, through copies, files and torch's compilers; decisions that are
kept, and not trusted."""

import copy
import importlib
import io
import json
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import structadmm as sa
from networks import VGG, ResNet, random_chain, randomise
from structadmm import _core, decisions, forms, segments
from structadmm.trace import trace

optimize_module = importlib.import_module("structadmm.optimize")
KINDS = ("A", "B", "bottleneck", "grouped", "mobile", "se")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(decisions.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "decisions.json"


def make(kind: str = "B", seed: int = 0) -> nn.Module:
    return randomise(ResNet(kind), 0.5, seed).eval()


def example(n: int = 2, size: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same(fast: nn.Module, model: nn.Module, x: Tensor, tolerance: float = 1e-4) -> None:
    want = model(x)
    torch.testing.assert_close(fast(x), want, rtol=tolerance, atol=tolerance * max(1.0, want.abs().max().item()))


def lowered(model: nn.Module, x: Tensor, **options):
    return sa.optimize(model, x, budget=0, report=False, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compacted", [False, True])
def test_same_function_at_any_batch_and_layout(kind: str, compacted: bool) -> None:
    model, x = make(kind), example()
    network = sa.compact(model, x, columns="always") if compacted else model
    fast = lowered(network, x)
    assert fast.report.choice == "segments" and segments.segments_of(fast)
    for n in (1, 2, 7):
        assert_same(fast, model, example(n))
    assert_same(fast, model, example(3).to(memory_format=torch.channels_last))
    assert_same(fast, model, example(3, 13)[:, :, 1:, :-1])
    with torch.inference_mode():
        assert_same(fast, model, example(3))


@pytest.mark.parametrize("seed", range(12))
def test_chains(seed: int) -> None:
    model = randomise(random_chain(seed), 0.5, seed).eval()
    assert_same(lowered(model, example()), model, example(5))


def test_other_map_sizes() -> None:
    model = make("B")
    fast = lowered(model, example())
    for size in (9, 16, 17):
        assert_same(fast, model, example(2, size))


def test_whole_networks_are_one_segment() -> None:
    for kind in KINDS:
        fast = lowered(make(kind), example())
        assert len(segments.segments_of(fast)) == 1, fast.report
        assert not fast.report.left
    assert len(segments.segments_of(lowered(randomise(VGG(), 0.5, 0).eval(), example()))) == 1


class Fork(nn.Module):
    """An operation that the runtime lacks on one of two branches that meet again, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = F.relu(self.a(x))
        z = torch.cat([torch.cumsum(self.b(x), 3), x], 1)
        x += torch.cumsum(x, 2)
        z = self.c(z)
        return z, {"sum": z + y, "x": x}


def test_calls_of_one_segment_go_to_its_op_at_once(monkeypatch) -> None:
    """But for whatever looks on: hooks of the network, of the segment and of all modules, tracers, other inputs."""
    model, x = make(), example()
    fast = lowered(model, x)
    segment = segments.segments_of(fast)["segment_0"]
    want, seen = fast(x), []
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "__call__", lambda self, *args: seen.append(self) or self.forward(*args))
        assert torch.equal(fast(x), want) and not seen
    for watched in (fast, segment):
        for register in (watched.register_forward_hook, watched.register_forward_pre_hook):
            hook = register(lambda m, *_: seen.append(m))
            assert torch.equal(fast(x), want) and seen == [watched]
            hook.remove()
            seen.clear()
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    assert torch.equal(fast(x), want) and seen == [segment, fast]
    hook.remove()
    assert torch.equal(fast(x=x), want) and torch.equal(fast(nn.Parameter(x, requires_grad=False)), want)
    with pytest.raises(TypeError):
        fast(x, x)
    with pytest.raises(ValueError, match="wanted 3 channels"):
        fast(x[:, :2])
    for replaced in (fast, segment):  # as wrappers of modules do
        forward = replaced.forward
        replaced.forward = lambda *args, forward=forward: seen.append(1) or forward(*args)
        seen.clear()
        assert torch.equal(fast(x), want) and seen
        del replaced.forward
    fast._compiled_call_impl = lambda *args: seen.append(2) or want
    assert fast(x) is want and seen[-1] == 2
    fast._compiled_call_impl = None
    fast.segment_0 = nn.Identity()
    assert fast(x) is x
    fast.segment_0 = segment
    seen.clear()
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "__call__", lambda self, *args: seen.append(self) or self.forward(*args))
        assert torch.equal(fast(x), want) and not seen
    outer = torch.fx.symbolic_trace(nn.Sequential(fast))
    assert torch.equal(outer(x), want)

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Recorder():
        assert torch.equal(fast(x), want)
    assert torch.ops.structadmm.run_segment.default in seen


def test_networks_without_segments_are_called_as_they_were() -> None:
    for function in (F.relu, lambda x: x.relu(), lambda x: torch.exp(x)):
        network = torch.fx.symbolic_trace(function)
        before = type(network).__call__
        segments.call_at_once(network)
        assert type(network).__call__ is before


def test_segments_are_convex_and_many_outputs_keep_their_places() -> None:
    model = Fork().eval()
    inputs = (example(), torch.randn(2, 6, 12, 12))
    fast = lowered(model, inputs)
    assert len(segments.segments_of(fast)) == 2
    assert set(fast.report.left) == {"cumsum", "cumsum_1"}
    with torch.no_grad():
        got, want = fast(*inputs), model(*inputs)
    torch.testing.assert_close(got, want)


def test_partition_is_maximal() -> None:
    traced = trace(make("B"), example())
    segments.normalise(traced)
    nodes = [n for n in traced.module.graph.nodes if n.op not in ("placeholder", "output")]
    torch.manual_seed(0)
    for _ in range(20):
        held = {n for n in nodes if torch.rand(()) < 0.8}
        groups = segments.partition(traced.module.graph, held)
        assert sorted(n.name for g in groups for n in g) == sorted(n.name for n in held)
        where = {n: set(g) for g in groups for n in g}
        assert not any(segments._returns(set(g), where) for g in groups)
        for a in groups:
            for b in groups:
                joined = any(set(n.all_input_nodes) & set(a) for n in b)
                assert a is b or not joined or segments._returns({*a, *b}, where)


def test_model_is_unchanged() -> None:
    model, x = make("se"), example()
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    lowered(model, x)
    sa.optimize(model, x, budget=0.1, report=False)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert flags == [p.requires_grad for p in model.parameters()] and not model.training


def test_training_mode_is_refused() -> None:
    model = make()
    with pytest.raises(sa.OptimizeError, match=r"optimize: model is in training mode, wanted eval\(\)"):
        sa.optimize(model.train(), example())
    fast = lowered(model.eval(), example())
    with pytest.raises(sa.OptimizeError, match="for inference"):
        fast.train()
    with pytest.raises(sa.OptimizeError, match="dtype got torch.float16"):
        sa.optimize(model, example(), dtype=torch.float16)
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    with pytest.raises(sa.OptimizeError, match="NaN or infinite"):
        sa.optimize(model, example())


def test_copies_and_pickles() -> None:
    model, x = make("bottleneck"), example()
    fast = lowered(model, x)
    assert_same(copy.deepcopy(fast), model, x)
    assert copy.deepcopy(fast).report.choice == "segments"
    assert_same(pickle.loads(pickle.dumps(fast)), model, x)
    other = lowered(make("bottleneck", seed=0), x)
    other.load_state_dict(fast.state_dict())
    assert_same(other, model, x)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False), model, x)


@pytest.mark.parametrize("kind", ["A", "se"])
def test_compile_and_export(kind: str) -> None:
    model, x = make(kind), example()
    fast = lowered(model, x)
    for dynamic in (False, True):
        compiled = torch.compile(fast, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for n in (2, 5):
            assert_same(compiled, model, example(n))
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    for dynamic_shapes in ({0: torch.export.Dim("n")}, sizes):
        program = torch.export.export(fast, (x,), dynamic_shapes=(dynamic_shapes,))
        assert_same(program.module(), model, example(5))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert_same(torch.export.load(buffer).module(), model, example(3, 14))


def test_aot_inductor(tmp_path) -> None:
    model, x = make("B"), example()
    fast = lowered(model, x)
    program = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("n", max=64)},))
    file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    assert_same(torch._inductor.aoti_load_package(file), model, example(5))


@pytest.mark.parametrize("kind", ["A", "B", "mobile"])
def test_saves_and_loads(kind: str, tmp_path) -> None:
    model, x = make(kind), example()
    small = sa.compact(model, x, columns="always")
    fast = lowered(small, x)
    file = tmp_path / "net.safetensors"
    sa.save(fast, file)
    again = sa.load(file)
    assert len(segments.segments_of(again)) == len(segments.segments_of(fast))
    assert_same(again, model, example(4))
    assert [s.shapes for s in segments.segments_of(again).values()] == [
        s.shapes for s in segments.segments_of(fast).values()
    ]
    assert again.meta["structadmm"]["metadata"]["report"]["layers"]  # of compact
    sa.save(again, tmp_path / "again.safetensors")
    assert_same(sa.load(tmp_path / "again.safetensors"), model, x)
    plain = sa.load(file, optimized=False)
    assert not segments.segments_of(plain)
    assert_same(plain, model, x)
    plain.train()
    assert set(dict(small.named_parameters())) == set(dict(plain.named_parameters()))


@pytest.mark.parametrize("name", forms.FORMS)
def test_forms_of_torch(name: str, tmp_path) -> None:
    for kind in ("A", "B", "se"):
        model, x = make(kind), example()
        traced = trace(sa.compact(model, x, columns="always"), x)
        segments.normalise(traced)
        for node in traced.module.graph.nodes:
            node.meta["shape"] = traced.shapes.get(node)
        fast = forms.make(traced.module, name)
        assert_same(fast, model, x)
        assert_same(copy.deepcopy(fast), model, example(5))
        sa.save(fast, tmp_path / "net.safetensors", example=x)
        again = sa.load(tmp_path / "net.safetensors")
        assert again.form.name == name
        with torch.no_grad():
            assert torch.equal(again(x), fast(x))
        half = forms.make(traced.module, name, torch.bfloat16)
        assert_same(half, model, x, 5e-2)
        assert half(x).dtype == torch.float32
        assert_same(torch.compile(fast, fullgraph=True, backend="aot_eager"), model, x)


def test_vendor_layers_within_segments(tmp_path) -> None:
    model, x = make("B"), example()
    work = optimize_module._Work(model, x, None, None)
    choice = optimize_module._Choice(vendor=["layer1.0.conv2", "conv1"])
    assert work.sound(choice)
    fast = work.fast(choice)
    assert sum(isinstance(m, forms.VendorConv2d) for m in fast.modules()) == 2 and len(segments.segments_of(fast)) == 2
    assert_same(fast, model, example(5))
    sa.save(fast, tmp_path / "net.safetensors", example=x)
    again = sa.load(tmp_path / "net.safetensors")
    assert {n for n, m in again.named_modules() if isinstance(m, forms.VendorConv2d)} == {"layer1.0.conv2", "conv1"}
    assert_same(again, model, x)
    assert_same(torch.compile(fast, fullgraph=True, backend="aot_eager"), model, x)


def test_bfloat16_inside() -> None:
    model, x = make("B"), example()
    fast = lowered(model, x, dtype=torch.bfloat16)
    assert fast(x).dtype == torch.float32 and fast.report.dtype == "bfloat16"
    assert 0 < fast.report.error < 0.05
    assert_same(fast, model, example(3), 5e-2)
    assert_same(lowered(model.to(torch.bfloat16), x.bfloat16()), model, x.bfloat16(), 5e-2)


class Words(nn.Module):
    """Integers in, and out with its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = (
            nn.Embedding(30, 16),
            nn.Linear(16, 64),
            nn.Linear(64, 16),
            nn.Linear(16, 30, bias=False),
        )
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x)
        y = self.head(h + self.down(F.relu(self.up(h))))
        return y, y.argmax(-1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_integers_go_in_and_out(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model, x = Words().eval(), torch.randint(30, (2, 5), generator=torch.Generator().manual_seed(0))
    small = sa.compact(model, x)
    fast = sa.optimize(small, x, budget=0.1, report=False, dtype=dtype)
    for n in (1, 3):
        words = torch.randint(30, (n, 5), generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            (y, best), (wanted, first) = fast(words), model(words)
        assert y.dtype is torch.float32 and best.dtype is torch.int64
        assert (y - wanted).abs().max() <= (1e-4 if dtype is None else 0.05) * wanted.abs().max()
        if dtype is None:
            assert torch.equal(best, first)


def test_float64_stays_with_torch() -> None:
    model, x = make("B").double(), example().double()
    fast = lowered(model, x)
    assert fast.report.choice in forms.FORMS
    assert_same(fast, model, x, 1e-10)


def test_decides_by_measuring_and_remembers(cache, monkeypatch) -> None:
    model, x = sa.compact(make("B"), example(), columns="always"), example()
    with monkeypatch.context() as patched:
        patched.setattr(optimize_module, "perf_counter", lambda: 0.0)  # no layer is left out, however busy the machine
        first = sa.optimize(model, x, budget=0.5, report=False)
    assert set(forms.FORMS) | {"segments"} <= set(first.report.candidates) and not first.report.cached
    assert all(r.seconds for r in first.report.layers)
    assert first.report.speed_up > 0
    assert json.loads(cache.read_text())["version"] == 1
    called = []
    monkeypatch.setattr(optimize_module, "interleave", lambda *a, **k: called.append(a))
    second = sa.optimize(model, x, budget=0.5, report=False)
    assert not called and second.report.cached
    assert second.report.candidates == first.report.candidates and second.report.choice == first.report.choice
    assert "figures of an earlier call" in str(second.report)
    json.dumps(second.report.to_dict())


def test_families_that_are_measured(monkeypatch) -> None:
    layers = [nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 8, 3, groups=2)]
    layers += [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)]
    with torch.no_grad():
        layers[4].weight[torch.arange(576).view(8, 8, 3, 3) % 3 > 0] = 0
    monkeypatch.setattr(optimize_module, "perf_counter", lambda: 0.0)
    wanted = [["taps", "winograd"], [], [], [], ["nonzeros"], ["taps"]]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 8, 12, 12)
        report = sa.optimize(nn.Sequential(*layers).eval(), x, dtype=dtype, budget=0.1, report=False).report
        measured = [[n.partition(" ")[2] for n in r.seconds if n.startswith("segments ")] for r in report.layers]
        if dtype == torch.bfloat16:
            wanted[0] = ["taps"] if _core.isa() in ("avx512", "avx512_bf16") else []
        assert measured == wanted


def test_layers_that_the_budget_leaves_out_stay_in_their_segments(cache, monkeypatch) -> None:
    model, x = sa.compact(make("B"), example(), columns="always"), example()
    hours = iter(range(0, 10**6, 3600))
    monkeypatch.setattr(optimize_module, "perf_counter", lambda: float(next(hours)))
    fast = sa.optimize(model, x, budget=0.5, report=False)
    assert not any(r.seconds for r in fast.report.layers)
    assert_same(fast, model, x)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[]", b'{"version": 1, "machines": 3}', b'{"version": 99, "machines": {}}']
)
def test_a_damaged_cache_is_ignored(cache, content: bytes) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content)
    with pytest.warns(UserWarning, match="decisions.json got"):
        fast = sa.optimize(make(), example(), budget=0.1, report=False)
    assert_same(fast, make(), example())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sa.optimize(make(), example(), budget=0.1, report=False).report.cached


def test_entries_of_the_cache_are_checked(cache) -> None:
    sa.optimize(make(), example(), budget=0.1, report=False)
    for spoil in (
        lambda e: e.update(choice={"form": "magic", "families": {}, "vendor": []}),
        lambda e: e.update(choice={"form": "segments", "families": {}, "vendor": ["nowhere"]}),
        lambda e: e.update(choice=None),
        lambda e: e.update(seconds={"segments": "soon"}),
    ):
        content = json.loads(cache.read_text())
        (machine,) = content["machines"].values()
        for entry in machine["networks"].values():
            spoil(entry)
        cache.write_text(json.dumps(content))
        fast = sa.optimize(make(), example(), budget=0.1, report=False)
        assert not fast.report.cached
        assert_same(fast, make(), example())


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(decisions.VARIABLE, str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="nothing is kept|it is ignored"):
        fast = sa.optimize(make(), example(), budget=0.1, report=False)
    assert_same(fast, make(), example())


def test_threads_are_restored_and_results_do_not_depend_on_them() -> None:
    model, x = make("B"), example(4)
    before = torch.get_num_threads()
    fast = lowered(model, x, threads=1)
    assert fast.report.threads == 1 and torch.get_num_threads() == before
    outs = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            with torch.no_grad():
                outs.append(fast(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)


def test_a_candidate_that_is_wrong_is_left_out(monkeypatch) -> None:
    right = segments.Segment.forward_one

    def wrong(self, x):
        return right(self, x) + 1

    monkeypatch.setattr(segments.Segment, "forward_one", wrong)
    with pytest.warns(UserWarning, match="segments got outputs that differ"):
        fast = lowered(make("B"), example())
    assert fast.report.choice in forms.FORMS and any("left out" in r for r in fast.report.remarks)
    assert_same(fast, make("B"), example())


def test_optimises_again(tmp_path) -> None:
    model, x = make("B"), example()
    fast = lowered(model, x)
    assert_same(lowered(fast, x), model, x)
    sa.save(fast, tmp_path / "net.safetensors")
    assert_same(lowered(sa.load(tmp_path / "net.safetensors"), x), model, x)


def test_report_is_printed(capsys) -> None:
    sa.optimize(make("A"), example(), budget=0.1)
    out = capsys.readouterr().out
    assert "layer1.0.conv1" in out and "The whole network" in out and "largest difference" in out


def test_shape_expressions_are_arithmetic_alone() -> None:
    assert sa.ops.evaluate("min((x0_2-2)//2+1,3*x0_1)", x0_2=9, x0_1=2) == 4
    for text in ("__import__('os')", "x0_2.real", "x0_9", "[1]", "1 if 1 else 2", "2**9", "(", "1//0", "1.5", ""):
        with pytest.raises(ValueError, match="run_segment: shapes got"):
            sa.ops.evaluate(text, x0_2=9)


def test_records_of_a_file_are_checked(tmp_path) -> None:
    model, x, file = make("B"), example(), tmp_path / "net.safetensors"
    network, record = segments.inline(lowered(model, x))
    row = record["segments"][0]
    names = row["nodes"]

    def refused(record: object) -> None:
        sa.save(network, file, example=x, metadata={"optimize": record})
        with pytest.raises(sa.ArtefactError, match="of the record got other values|wanted convex ones"):
            sa.load(file)
        assert_same(sa.load(file, optimized=False), model, x)

    for bad in (
        {},
        {**record, "form": {"name": "magic", "dtype": "float32"}},
        {**record, "form": {"name": "folded", "dtype": "complex64"}},
        {**record, "vendor": {"nowhere": True}},
        {**record, "vendor": {"conv1": 1}},
        {**record, "segments": 3},
        {**record, "segments": [3]},
        {**record, "segments": [row, row]},
        {**record, "segments": [{**row, "nodes": ["nowhere"]}]},
        {**record, "segments": [{**row, "nodes": [names[0], names[-1]], "shapes": "1;1"}]},
        {**record, "segments": [{**row, "dtype": "float64"}]},
        {**record, "segments": [{**row, "shapes": "1;2"}]},
        {**record, "families": {"conv1": 2}},
        {**record, "families": {"nowhere": "taps"}},
    ):
        refused(bad)
    sa.save(network, file, example=x, metadata={"optimize": {**record, "report": None}})
    assert_same(sa.load(file), model, x)
    sa.save(network, file, example=x, metadata={"optimize": "the user's own word"})
    assert_same(sa.load(file), model, x)
