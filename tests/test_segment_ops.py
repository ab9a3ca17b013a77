"""run_segment, a subgraph in one op: against torch, under its tracers, and its cache of engines."""

import threading

import pytest
import torch
from torch import nn

from networks import ResNet, randomise
from structadmm import container, ops
from structadmm.nn import CompactConv2d
from structadmm.trace import trace


def program(model, x):
    module = trace(model, x, who="test").module
    return torch.frombuffer(bytearray(container.to_bytes(module)), dtype=torch.uint8).clone()


@pytest.fixture(scope="module")
def segment():
    """Two outputs of a residual network, its program and their shapes."""

    class Two(ResNet):
        def forward(self, x):
            y = self.layer1(torch.relu(self.bn1(self.conv1(x))))
            return y, self.fc(y.mean((2, 3)))

    model = randomise(Two("B"), 0.4, 1).eval()
    return model, program(model, torch.zeros(2, 3, 8, 8)), "x0_0,16,(x0_2-1)//2+1,(x0_3-1)//2+1;x0_0,10"


class Segment(nn.Module):
    def __init__(self, program, shapes, dtype="float32"):
        super().__init__()
        self.register_buffer("program", program)
        self.shapes, self.dtype = shapes, dtype

    def forward(self, x):
        y, z = ops.run_segment([x], self.program, self.dtype, self.shapes)
        return y + 1, z * 2


def close(got, want, rtol):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
        assert (a - b).abs().max() <= rtol * b.abs().max()


@torch.no_grad()
def test_against_torch(segment):
    model, code, shapes = segment
    for size in [(1, 3, 8, 8), (4, 3, 9, 11), (2, 3, 16, 8)]:
        x = torch.randn(*size)
        want = model(x)
        for view in (
            x,
            x.contiguous(memory_format=torch.channels_last),
            x.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            close(ops.run_segment([view], code, "float32", shapes), want, 2e-5)
        # Some roundings to bf16, each of 2^-9, on the way; fp16 rounds the input and the output by 2^-11.
        close(ops.run_segment([x], code, "bfloat16", shapes), want, 2**-9 * 12)
        half = ops.run_segment([x.half()], code, "float32", shapes)
        close([t.float() for t in half], want, 2**-11 * 8)
        assert half[0].dtype == torch.float16
        assert ops.run_segment([x.bfloat16()], code, "bfloat16", shapes)[1].dtype == torch.bfloat16
    empty = ops.run_segment([torch.zeros(0, 3, 8, 8)], code, "float32", shapes)
    assert [t.shape for t in empty] == [(0, 16, 4, 4), (0, 10)]


@torch.no_grad()
def test_threads_give_the_same_bits(segment):
    _, code, shapes = segment
    x, before, results = torch.randn(5, 3, 12, 12), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.run_segment([x], code, "float32", shapes)[1])
    finally:
        torch.set_num_threads(before)
    workers = [
        threading.Thread(target=lambda: results.append(ops.run_segment([x], code, "float32", shapes)[1]))
        for _ in range(4)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(results) == 7 and all(torch.equal(r, results[0]) for r in results)


@torch.no_grad()
def test_tracers(segment):
    model, code, shapes = segment
    module, x = Segment(code, shapes), torch.randn(3, 3, 8, 8)
    want = module(x)
    close(want, [model(x)[0] + 1, model(x)[1] * 2], 2e-5)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for batch in (3, 5, 1):
        y = torch.randn(batch, 3, 8, 8)
        for traced in (compiled, exported) if batch > 1 else (compiled,):
            assert all(map(torch.equal, traced(y), module(y)))
    torch.library.opcheck(torch.ops.structadmm.run_segment.default, ([x], code, "float32", shapes))


@torch.no_grad()
def test_another_program_at_the_same_address_is_another_segment():
    x, buffer = torch.randn(1, 4, 3, 3), None
    for seed in range(40):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).eval()
        code = program(model, x)
        buffer = code if buffer is None else buffer
        assert buffer.shape == code.shape
        buffer.copy_(code)
        close(ops.run_segment([x], buffer, "float32", "x0_0,4,3,3"), [model(x)], 2e-5)


@torch.no_grad()
def test_one_tensor_is_one_of_a_list():
    x = torch.randn(3, 4, 6, 5)
    code = program(nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()).eval(), x)
    for dtype in ("float32", "bfloat16"):
        for t in (x, x.bfloat16(), x.half(), x[:0], x.contiguous(memory_format=torch.channels_last)):
            got = torch.ops.structadmm.run_segment_1(t, code, dtype == "bfloat16")
            (want,) = ops.run_segment([t], code, dtype, "x0_0,5,6,5")
            assert got.dtype == want.dtype and torch.equal(got, want)


def test_errors(segment):
    _, code, shapes = segment
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises((ValueError, RuntimeError), match="run_segment: program got 2 outputs, wanted one"):
        torch.ops.structadmm.run_segment_1(x, code, False)

    def error(*arguments):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            torch.ops.structadmm.run_segment(*arguments)
        assert " got " in str(caught.value) and ", wanted " in str(caught.value)
        return str(caught.value)

    assert "dtype got 'float16'" in error([x], code, "float16", shapes)
    assert "3 channels" in error([torch.zeros(1, 4, 8, 8)], code, "float32", shapes)
    assert "inputs got 2 tensors, wanted 1" in error([x, x], code, "float32", shapes)
    assert "f64" in error([x.double()], code, "float32", shapes)
    assert "bytes of an artefact" in error([x], code.float(), "float32", shapes)
    assert "whole safetensors file" in error([x], code[:100].clone(), "float32", shapes)
    assert "whole safetensors file" in error([x], torch.full((40,), 255, dtype=torch.uint8), "float32", shapes)


@pytest.mark.parametrize("rows,width", [(1200, 1024), (300, 256)])
@torch.no_grad()
def test_large_outputs_keep_their_memory_apart(rows, width):
    """Large outputs lie in memory that is used again, but only when nobody holds it."""
    model = nn.Conv2d(1, 8, 1).eval()
    shapes = "x0_0,8,x0_2,x0_3"
    xs = [torch.randn(1, 1, rows, width) for _ in range(3)]
    code = program(model, xs[0])

    def run(x):
        return ops.run_segment([x], code, "float32", shapes)[0]

    a, b = run(xs[0]), run(xs[1])
    assert a.data_ptr() != b.data_ptr()
    part, place = b[0, 1], b.data_ptr()
    del b
    c = run(xs[2])
    assert c.data_ptr() not in (a.data_ptr(), place), "a view of the output holds its memory"
    close([a, part, c], [model(xs[0]), model(xs[1])[0, 1], model(xs[2])], 1e-6)
    del part
    fewer = rows - rows // 12
    d = run(xs[0][:, :, :fewer])
    assert d.data_ptr() == place
    close([d, a + 1], [model(xs[0][:, :, :fewer]), model(xs[0]) + 1], 1e-6)
    last = c.data_ptr()
    del d, c
    assert run(xs[1]).data_ptr() == last, "of two that are idle, caches may still hold the last"


@torch.no_grad()
def test_channels_that_no_tap_reads_are_not_read():
    """Whatever they hold; and where another node reads them, all are."""

    class Two(nn.Module):
        def __init__(self, adds):
            super().__init__()
            torch.manual_seed(0)
            self.adds = adds
            self.convs = nn.ModuleList()
            for read in ((1, 2, 5), (5, 6)):
                conv = nn.Conv2d(9, 9, 3, padding=1)
                conv.weight[:, [c for c in range(9) if c not in read]] = 0
                self.convs.append(CompactConv2d.from_dense(conv, block=9))

        def forward(self, x):
            y = self.convs[0](x) + self.convs[1](x)
            return y + x if self.adds else y

    for adds in (False, True):
        model = Two(adds).eval()
        x = torch.randn(3, 9, 40, 33)
        code, want = program(model, x), model(x)
        if not adds:
            x[:, [0, 3, 4, 7, 8]] = torch.nan
        for threads in (1, 2):
            torch.set_num_threads(threads)
            close(ops.run_segment([x], code, "float32", "x0_0,9,x0_2,x0_3"), [want], 1e-5)
        torch.set_num_threads(1)
