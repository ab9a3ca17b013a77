"""How fast is the fused project-and-update over all conv weights of a ResNet-50, in f32?

Peers: the same with the same promises in plain torch: eager; compiled and called layer by layer, as the op is; and
compiled as one graph over all layers, where the compiler may plan the memory of all of them. Roof: torch's copy of a
large buffer in the same run. Bytes counted are what the algorithm must move: W and U read twice (norms, then update),
Z read once, Z and U written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from structadmm import ops
from structadmm.groups import n_groups
from timing import arguments, copy_call, finish, interleave, machine, sync_of


def resnet50_convs() -> list[tuple[int, int, int, int]]:
    """Weight shapes of the 53 convolutions of a ResNet-50: 23,454,912 weights."""
    shapes = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return shapes


def plain(w: Tensor, z: Tensor, u: Tensor, structure: str, k: int) -> tuple[Tensor, Tensor]:
    """project_update_ in torch for column and filter groups: ties to the lower index, f64 sums of residuals."""
    v = w + u
    squares = (v * v).flatten(1)
    scores = squares.sum(0) if structure == "column" else squares.sum(1)
    kept = torch.sort(scores, descending=True, stable=True).indices[:k]
    keep = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, kept, True)
    on = keep.view(1, *w.shape[1:]) if structure == "column" else keep.view(-1, *[1] * (w.dim() - 1))
    znew = torch.where(on, v, 0.0)
    unew = v - znew
    sums = torch.stack([t.double().square().sum() for t in (w - znew, znew - z, w, znew, unew)])
    z.copy_(znew)
    u.copy_(unew)
    return keep, sums


def measure(structure: str, device: str, repeats: int, compiled: bool) -> dict[str, Any]:
    """One row: ours, the peers and the copy, in turns."""
    torch.manual_seed(0)
    shapes = resnet50_convs()
    ws = [torch.randn(s, device=device) for s in shapes]
    ks = [n_groups(structure, s) // 4 for s in shapes]
    weights = sum(w.numel() for w in ws)

    def over_layers(step: Callable[..., Any]) -> Callable[[], None]:
        zs, us = [torch.zeros_like(w) for w in ws], [torch.zeros_like(w) for w in ws]

        def run() -> None:
            for w, z, u, k in zip(ws, zs, us, ks, strict=True):
                step(w, z, u, structure, k)

        return run

    copy, copied = copy_call(device=device)
    calls: dict[str, Callable[[], object]] = {
        "structadmm": over_layers(ops.project_update_),
        "eager": over_layers(plain),
        "copy": copy,
    }
    if compiled:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64  # one graph per shape of a layer
        calls["torch.compile"] = over_layers(torch.compile(plain, fullgraph=True, dynamic=False))
        calls["torch.compile, one graph"] = torch.compile(over_layers(plain), fullgraph=True)
    times = interleave(calls, repeats=repeats, sync=sync_of(device))
    moved = 7 * 4 * weights
    bandwidth, roof = moved / times["structadmm"].median, copied / times["copy"].median
    row: dict[str, Any] = {
        "structure": structure,
        **machine(device, dtype="f32"),
        "weights": weights,
        "bytes": moved,
        "seconds": times.to_dict(),
        "bandwidth_GBps": bandwidth / 1e9,
        "copy_GBps": roof / 1e9,
        "share_of_copy": times.ratio("copy", "structadmm").median * moved / copied,
    }
    for peer in set(calls) - {"structadmm", "copy"}:
        row[f"speedup_over_{peer}"] = times.ratio(peer, "structadmm").to_dict()
    peers = "  ".join(f"{p} {row[f'speedup_over_{p}']['median']:.2f}x" for p in calls if f"speedup_over_{p}" in row)
    print(
        f"{structure:12} {row['threads']} threads  {times['structadmm'].median * 1e3:7.2f} ms  "
        f"{bandwidth / 1e9:5.1f} GB/s = {row['share_of_copy']:.0%} of copy ({roof / 1e9:.1f})  faster than: {peers}",
        flush=True,
    )
    return row


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--structures", nargs="+", default=["column"], choices=["column", "filter"])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    args = parser.parse_args()
    rows = []
    for threads in args.threads if args.device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        rows += [measure(s, args.device, args.repeats, not args.no_compile) for s in args.structures]
    finish({"question": (__doc__ or "").splitlines()[0], "rows": rows}, args.json)


if __name__ == "__main__":
    main()
