"""How fast are compacted convolutions, layer by layer, against everything a user of the dense layer could pick?

The ideal is the fastest dense peer's time multiplied by the density that is left; the score is ideal / ours. Both
sides take f32 NCHW and leave f32 NCHW, and all that this costs counts: changes of layout and dtype, padding. Peers that
keep their own layout and dtype on both sides ("native") are measured too and stand beside the score, not in it.

Every row also has what limits it: the share of the peak measured in the same run (peak.py) that the multiply-adds that
are left reach, and the share of our time in which torch merely fills the output.

    python bench/inference_layers.py --json bench/results/inference_layers.json              # everything
    python bench/inference_layers.py --only resnet18 --batch 1 --density 0.1 --dtype bf16        # a part
    python bench/inference_layers.py --blocks 2 4 8 16 32 --density 0.1 --json ...               # block-columns as well

Rows already in the JSON are kept and not measured again (--again: measured again).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import networks
import peers as peers_of
from networks import Layer
from ours import compacted, ours
from peak import peaks
from timing import arguments, interleave, keep, kept, machine, settle

DENSITIES = [0.5, 0.25, 0.1, 1 / 15]
# A peer this much slower than the fastest in a first, short comparison is left out of the long one.
CONTENDER = 1.3


def column_density(conv: torch.nn.Conv2d) -> float:
    """The share of (filter, column) places that the kept columns of each filter's block have: of all weights."""
    return float((conv.weight != 0).float().mean())


def ours_calls(
    layer: Layer, x: Tensor, dtype: str, densities: list[float], blocks: list[int]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float], dict[str, str]]:
    """Per variant ("column 0.1", "block8 0.1") the call and its density; and what this build can't run."""
    calls: dict[str, Callable[[], Tensor]] = {}
    density: dict[str, float] = {}
    absent: dict[str, str] = {}
    for d in densities:
        for block in (0, *blocks):
            torch.manual_seed(0)
            conv = networks.prune_(layer.conv(), d, "block" if block else "column", block)
            name = f"{f'block{block}' if block else 'column'} {d:.4g}"
            try:
                net = ours(compacted(conv, block or conv.out_channels // conv.groups), x, dtype, measured=False)
                got = net(x)
            except NotImplementedError as error:
                absent[name] = str(error)
                continue
            peers_of.check(f"{layer.name}, {name}", got, conv(x), dtype)
            calls[name] = lambda net=net: net(x)
            density[name] = column_density(conv)
    return calls, density, absent


def contenders(calls: dict[str, Any], native: dict[str, Any], threads: int = 1) -> tuple[list[str], dict[str, float]]:
    """The peers worth a long comparison, and everybody's time in the short one."""
    times = interleave({**calls, **native}, warmup=0.02, repeats=3, min_time=0.004, settle=settle(threads))
    first = {name: times[name].median for name in times.rounds}
    names: list[str] = []
    for kind in (calls, native):
        if kind:
            best = min(first[name] for name in kind)
            names += [name for name in kind if first[name] <= CONTENDER * best]
    return names, first


def measure(
    layer: Layer,
    batch: int,
    dtype: str,
    threads: int,
    densities: list[float],
    blocks: list[int],
    peak: dict[str, float],
    repeats: int = 11,
    only_peers: list[str] | None = None,
) -> dict[str, Any]:
    """One row: the dense peers and ours at every density, in turns."""
    torch.manual_seed(0)
    conv, x = layer.conv(), layer.input(batch)
    peers = peers_of.build(conv, x, dtype, threads, only=only_peers, native=True)
    mine, density, absent = ours_calls(layer, x, dtype, densities, blocks)
    names, first = contenders(peers.calls, peers.native, threads)
    everybody = peers.calls | peers.native
    out = torch.empty_like(conv(x))
    calls = {name: everybody[name] for name in names} | mine | {"fill output": lambda: out.fill_(1)}
    # A slow layer needs no twenty milliseconds a turn to be known well.
    times = interleave(calls, warmup=0.02, repeats=repeats, min_time=0.008, settle=settle(threads))
    dense = [name for name in names if name in peers.calls]
    best = times.fastest(*dense)
    best_native = times.fastest(*(n for n in names))
    macs = layer.macs() * batch
    row: dict[str, Any] = {
        "layer": layer.name,
        "batch": batch,
        "shape": list(x.shape),
        "filters": layer.filters,
        "kernel": layer.kernel,
        "stride": layer.stride,
        "groups": layer.groups,
        **machine(dtype=dtype),
        "versions": peers.versions,
        "absent": peers.absent | absent,
        "multiply_adds": macs,
        "peak": peak,
        "seconds_first": first,
        "seconds": times.to_dict(),
        "fastest": best,
        "fastest_with_native": best_native,
        "dense_gflops": 2 * macs / times[best].median / 1e9,
        "ours": {},
    }
    fill = times["fill output"].median
    for name in mine:
        ratio = times.ratio(best, name)
        seconds = times[name].median
        work = 2 * macs * density[name] / (peak[dtype] * threads) if peak else 0.0
        row["ours"][name] = {
            "density": density[name],
            "seconds": seconds,
            "speedup": ratio.to_dict(),
            "score": ratio.median * density[name],
            "score_with_native": times.ratio(best_native, name).median * density[name],
            "gflops": 2 * macs * density[name] / seconds / 1e9,
            "share_of_peak": work / seconds,
            "fill_share": fill / seconds,
        }
    return row


def summary(rows: list[dict[str, Any]], kind: str = "column") -> list[dict[str, Any]]:
    """Geometric mean and least score per dtype, threads and batch (0: all batches)."""
    found = []
    for dtype, threads in sorted({(r["dtype"], r["threads"]) for r in rows}, key=lambda k: (k[0] != "f32", k[1])):
        for batch in (0, *sorted({r["batch"] for r in rows})):
            scores = [
                (v["score"], f"{r['layer']}, batch {r['batch']}, {name}")
                for r in rows
                if (r["dtype"], r["threads"]) == (dtype, threads) and batch in (0, r["batch"])
                for name, v in r["ours"].items()
                if name.startswith(kind)
            ]
            if scores:
                mean = math.exp(sum(math.log(s) for s, _ in scores) / len(scores))
                least = min(scores)
                found.append({"dtype": dtype, "threads": threads, "batch": batch, "cases": len(scores),
                              "geometric_mean": mean, "least": least[0], "least_at": least[1]})  # fmt: skip
    return found


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["layer"], row["batch"], row["dtype"], row["threads"]


def line(row: dict[str, Any]) -> str:
    cells = "  ".join(f"{n} {v['speedup']['median']:.2f}x ({v['score']:.2f})" for n, v in row["ours"].items())
    dense = row["seconds"][row["fastest"]]["median"]
    return (
        f"{row['layer']:22} batch {row['batch']:<3} {row['dtype']:4} {row['threads']} threads  "
        f"dense {1e6 * dense:9.1f} us {row['dense_gflops']:7.1f} GFLOP/s ({row['fastest']})  {cells}"
    )


def main() -> None:
    parser = arguments(__doc__ or "", repeats=11)
    parser.add_argument("--only", nargs="+", default=[""], help="layers whose name contains one of these")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--density", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="block-columns of these filters as well")
    parser.add_argument("--dtype", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"])
    parser.add_argument("--peers", nargs="+", help="only these peers")
    parser.add_argument("--again", action="store_true", help="measure rows that the JSON has")
    args = parser.parse_args()
    rows = kept(args.json)
    wanted = {f"column {d:.4g}" for d in args.density}
    wanted |= {f"block{b} {d:.4g}" for d in args.density for b in args.blocks}
    with torch.no_grad():
        peak = peaks()
        for threads in args.threads:
            torch.set_num_threads(threads)
            for dtype in args.dtype:
                for layer in (la for la in networks.LAYERS if any(part in la.name for part in args.only)):
                    for batch in args.batch:
                        at = (layer.name, batch, dtype, threads)
                        old = next((r for r in rows if key(r) == at), None)
                        if old and not args.again and wanted <= {*old["ours"], *old["absent"]}:
                            continue
                        row = measure(layer, batch, dtype, threads, args.density, args.blocks, peak, args.repeats,
                                      args.peers)  # fmt: skip
                        print(line(row), flush=True)
                        if old:
                            # Ratios hold within their own run, whose peers and ours took turns.
                            row["ours"] = old["ours"] | row["ours"]
                        rows = [r for r in rows if key(r) != at] + [row]
                        keep((__doc__ or "").splitlines()[0], rows, args.json)
    for s in summary(rows):
        print(
            f"{s['dtype']} {s['threads']} threads, batch {s['batch'] or 'all'}: score of {s['cases']} cases: "
            f"geometric mean {s['geometric_mean']:.2f}, least {s['least']:.2f} ({s['least_at']})"
        )


if __name__ == "__main__":
    main()
