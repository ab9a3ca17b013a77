"""How fast is CompactConv2d against the fastest dense convolution of torch, layer by layer, in f32?

Peers, on the same layer with its zeros stored: torch in NCHW, torch in channels-last (input and weight already so), and
oneDNN with its weight reordered beforehand, as inductor's freezing does it, on both layouts. Ours takes NCHW, and its
time counts everything: the padded copy, the kernel, the module's call. The ideal is the fastest peer's time multiplied
by the density that is left; the score is ideal / ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structadmm.nn import CompactConv2d
from timing import arguments, finish, interleave, machine, sync_of


@dataclass(frozen=True)
class Case:
    name: str
    channels: int
    size: int
    filters: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    density: float = 0.10
    padded: bool = True


TARGETS = [Case("alexnet conv3/2", 192, 13, 384), Case("128x16x16", 128, 16, 128)]
CASES = [
    *TARGETS,
    Case("demo 16x8x8", 16, 8, 16, density=0.2),
    Case("demo 32x4x4", 32, 4, 32, density=0.2),
    Case("demo 16->32 /2", 16, 8, 32, stride=2, density=0.2),
    Case("lenet conv2", 20, 12, 50, kernel=5, padded=False),
    Case("resnet18 stage1", 64, 32, 64),
    Case("resnet18 stage2/2", 64, 32, 128, stride=2),
    Case("resnet18 stage2", 128, 16, 128, density=0.25),
    Case("resnet18 stage3", 256, 8, 256),
    Case("resnet18 stage4", 512, 4, 512),
    Case("resnet18 shortcut", 128, 16, 256, kernel=1, stride=2, padded=False),
    Case("alexnet conv2", 96, 27, 256, kernel=5, groups=2, density=1 / 15),
    Case("resnet50 3x3", 128, 28, 128, density=0.25),
    Case("resnet50 7x7 map", 512, 7, 512),
    Case("resnet50 1x1", 256, 14, 1024, kernel=1, density=0.25, padded=False),
    Case("vgg 3x3", 128, 56, 128),
    Case("half dense", 128, 28, 128, density=0.5),
]


def sparse_conv(case: Case, block: int | None, device: str) -> nn.Conv2d:
    """A convolution with exactly the case's share of columns left, in each block of filters (None: in a conv group)."""
    padding = case.kernel // 2 if case.padded else 0
    conv = nn.Conv2d(
        case.channels, case.filters, case.kernel, case.stride, padding, groups=case.groups, device=device
    ).eval()
    per_group = case.filters // case.groups
    columns = conv.weight[0].numel()
    kept = max(1, round(case.density * columns))
    mask = torch.zeros(case.filters, columns, device=device)
    step = per_group if block is None else block
    for first in range(0, case.filters, step):
        mask[first : first + step, torch.randperm(columns, device=device)[:kept]] = 1
    with torch.no_grad():
        conv.weight.mul_(mask.view_as(conv.weight))
    return conv


def reordered(conv: nn.Conv2d, x: Tensor) -> Callable[[], Tensor]:
    """The convolution on a weight that oneDNN has put in its own order for this input."""
    mkldnn = torch.ops.mkldnn
    sizes = (conv.padding, conv.stride, conv.dilation, conv.groups)
    w = mkldnn._reorder_convolution_weight(conv.weight.detach(), *sizes, x.shape)
    b = None if conv.bias is None else conv.bias.detach()
    return lambda: mkldnn._convolution_pointwise(x, w, b, *sizes, "none", [], "")


def measure(case: Case, batch: int, blocks: list[int], device: str, repeats: int) -> dict[str, Any]:
    """One row: the peers and ours over column and block-column sparsity, in turns."""
    torch.manual_seed(0)
    conv = sparse_conv(case, None, device)
    x = torch.randn(batch, case.channels, case.size, case.size, device=device)
    last = sparse_conv(case, None, device)
    last.load_state_dict(conv.state_dict())
    last = last.to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    peers: dict[str, Callable[[], Tensor]] = {"nchw": lambda: conv(x), "channels_last": lambda: last(x_last)}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        peers |= {"onednn": reordered(conv, x), "onednn_channels_last": reordered(conv, x_last)}
    layers = {"column": CompactConv2d.from_dense(conv)}
    layers |= {f"block{b}": CompactConv2d.from_dense(sparse_conv(case, b, device), block=b) for b in blocks}
    want = conv(x)
    for name, peer in peers.items():
        torch.testing.assert_close(peer().contiguous(), want, rtol=1e-3, atol=1e-3, msg=name)
    torch.testing.assert_close(layers["column"](x), want, rtol=1e-3, atol=1e-3)
    ours: dict[str, Callable[[], Tensor]] = {n: (lambda m=m: m(x)) for n, m in layers.items()}
    times = interleave(peers | ours, warmup=0.1, repeats=repeats, sync=sync_of(device))
    best = times.fastest(*peers)
    density = layers["column"].weight.numel() / conv.weight.numel()
    macs = conv.weight.numel() * want[0, 0].numel() * batch
    row: dict[str, Any] = {
        "layer": case.name,
        "shape": [batch, case.channels, case.size, case.size],
        "filters": case.filters,
        "kernel": case.kernel,
        "stride": case.stride,
        "groups": case.groups,
        "density": density,
        **machine(device, dtype="f32"),
        "seconds": times.to_dict(),
        "fastest_dense": best,
        "ideal_seconds": times[best].median * density,
        "dense_gmacs": macs / times[best].median / 1e9,
        "column_gmacs": macs * density / times["column"].median / 1e9,
    }
    for name in ours:
        faster = times.ratio(best, name)
        row[name] = {"speedup": faster.to_dict(), "score": faster.median * density}
    cells = "  ".join(f"{n} {row[n]['speedup']['median']:6.2f}x ({row[n]['score']:4.2f})" for n in ours)
    microseconds = [1e6 * t for t in (times[best].median, row["ideal_seconds"], times["column"].median)]
    print(
        f"{case.name:18} batch {batch:<3} {row['threads']} threads  density {density:5.3f}  "
        f"dense {microseconds[0]:8.1f} us ({best})  ideal {microseconds[1]:7.1f}  ours {microseconds[2]:7.1f}  {cells}",
        flush=True,
    )
    return row


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__ or "", threads=[1])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--blocks", type=int, nargs="*", default=[16, 8, 4], help="block-column sizes to compare")
    parser.add_argument("--targets", action="store_true", help="only the two layers that have a target")
    args = parser.parse_args()
    rows = []
    with torch.no_grad():
        for threads in args.threads:
            torch.set_num_threads(threads)
            for case in TARGETS if args.targets else CASES:
                rows += [measure(case, batch, args.blocks, args.device, args.repeats) for batch in args.batches]
    finish({"question": (__doc__ or "").splitlines()[0], "rows": rows}, args.json)


if __name__ == "__main__":
    main()
