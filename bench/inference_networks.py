"""How fast are pruned networks end to end, against everything a user of the dense network could pick?

Each case prunes a network (networks.py), compacts it, optimises it, and takes turns with the peers on the dense
network. f32 NCHW in and out for everybody; f32 against f32, bf16 against bf16. Two kinds of cases differ: where only
filters were removed, what is left is an ordinary dense network, and the peers get that smaller network; and the sweep
compares with the forms of torch alone, because it is torch's user to whom optimize promises never to be slower.

Two cases are means over layers: AlexNet's conv2-5 with columns at 1/15, and the trained pattern of structured sparsity
learning, whose speed-up its authors give in that way.

    python bench/inference_networks.py --json bench/results/inference_networks.json
    python bench/inference_networks.py --only "resnet18 columns 0.10" --batch 16 --dtype bf16 --threads 1

Rows already in the JSON are kept and not measured again (--again: measured again).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import inference_layers
import networks
import peers as peers_of
import structadmm as sa
from networks import halve_inner_filters_, prune_convs_, ssl_pattern_
from ours import decided, ours
from peak import peaks
from timing import arguments, interleave, keep, kept, machine, settle

RUNTIMES = ["openvino", "onnxruntime", "openvino_bf16"]
TORCH = [n for n in peers_of.F32 + peers_of.BF16 if n not in RUNTIMES]
# As for the tests: STRUCTADMM_DATA, or ../shared/data beside the checkout. Without the file its cases are left out.
DATA = Path(os.environ.get("STRUCTADMM_DATA") or Path(__file__).parents[2] / "shared/data")
SSL = DATA / "weights/ssl_caffenet_conv/alexnet_0.54214_1.0e_3.npz"
SWEEP = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


@dataclass(frozen=True)
class Case:
    """prune: zeros, in place. against: "dense" (all peers, on the dense network), "torch" (its forms, likewise), or
    "smaller" (OpenVINO and ONNX Runtime on the compacted network). target: least speed-up wanted, by dtype.
    """

    name: str
    network: str
    prune: Callable[[nn.Module], nn.Module]
    batches: tuple[int, ...] = (1, 16)
    dtypes: tuple[str, ...] = ("f32", "bf16")
    against: str = "dense"
    target: dict[str, float] = field(default_factory=dict)


def _filters(net: nn.Module) -> nn.Module:
    """Half of the filters of every convolution but the last, whose output the user takes."""
    chain = list(networks.convs(net).values())
    for i, conv in enumerate(chain[:-1]):
        networks.prune_(conv, 0.5, "filter", seed=i)
    return net


CASES = [
    Case("resnet18 columns 0.10", "resnet18/cifar", partial(prune_convs_, density=0.1), target={"f32": 9, "bf16": 10}),
    Case("resnet18 block-columns (8) 0.10", "resnet18/cifar", partial(prune_convs_, density=0.1, structure="block")),
    Case("resnet18 elements 0.10", "resnet18/cifar", partial(prune_convs_, density=0.1, structure="element"),
         dtypes=("f32",), target={"f32": 4.5}),
    Case("resnet50 3x3 columns 0.25, inner filters halved", "resnet50", partial(halve_inner_filters_, columns=0.25),
         batches=(1,), target={"f32": 2.5}),
    Case("alexnet convs, pattern of SSL", "alexnet convs", partial(ssl_pattern_, path=SSL)),
    Case("resnet18 inner filters halved", "resnet18/cifar", halve_inner_filters_, against="smaller",
         target={"f32": 1, "bf16": 1}),
    Case("resnet50 inner filters halved", "resnet50", halve_inner_filters_, batches=(1,), against="smaller",
         target={"f32": 1, "bf16": 1}),
    Case("vgg16 convs, filters halved", "vgg16 convs", _filters, batches=(1,), against="smaller",
         target={"f32": 1, "bf16": 1}),
    *(Case(f"sweep resnet18 columns {d:.2f}", "resnet18/cifar", partial(prune_convs_, density=d), against="torch",
           dtypes=("f32",), target={"f32": 0.98}) for d in SWEEP),
]  # fmt: skip
LAYER_CASES = {
    "alexnet conv2-5, columns 1/15, mean of layers": {"batches": (1, 16), "target": {"f32": 12.0}},
    "alexnet conv1-5, pattern of SSL, mean of layers": {"batches": (1, 16), "target": {"f32": 5.3}},
    "alexnet conv2-5, pattern of SSL, mean of layers": {"batches": (1, 16), "target": {"f32": 6.3}},
}

Row = dict[str, Any]


def compacted(case: Case, dense: nn.Module, x: Tensor) -> Any:
    pruned = case.prune(copy.deepcopy(dense))
    return sa.compact(pruned, x, columns="never" if case.against == "smaller" else "auto")


def multiply_adds_left(case: Case, report: Any) -> float:
    """Per image: of stored weights; where single weights went, of those that are not zero."""
    if "elements" not in case.name:
        return float(report.macs_after)
    return sum(r.macs_before * r.weights_nonzero / r.weights_before for r in report.layers)


def group(
    cases: list[Case],
    batch: int,
    dtype: str,
    threads: int,
    peak: dict[str, float],
    repeats: int,
    names: list[str] | None,
) -> list[Row]:
    """The rows of cases that share a dense network and its peers, all in one interleaved run."""
    dense, shape = networks.network(cases[0].network)
    torch.manual_seed(1)
    x = torch.randn(batch, *shape)
    small = {case.name: compacted(case, dense, x) for case in cases}
    kind = cases[0].against
    base = small[cases[0].name] if kind == "smaller" else dense
    allowed = {"dense": None, "torch": TORCH, "smaller": RUNTIMES}[kind]
    only = names if allowed is None else [n for n in allowed if names is None or n in names]
    peers = peers_of.build(base, x, dtype, threads, only=only)
    calls: dict[str, Callable[[], object]] = {}
    absent: dict[str, str] = {}
    fast = {}
    for name, net in small.items():
        try:
            fast[name] = ours(net, x, dtype)
        except NotImplementedError as error:
            absent[name] = str(error)
            continue
        peers_of.check(name, fast[name](x), net(x), dtype)
        calls[name] = lambda net=fast[name]: net(x)
    chosen, first = inference_layers.contenders(peers.calls, {}, threads)
    times = interleave({n: peers.calls[n] for n in chosen} | calls, warmup=0.1, repeats=repeats, settle=settle(threads))
    best = times.fastest(*chosen)
    rows = []
    for case in cases:
        macs, left = networks.multiply_adds(base, x), batch * multiply_adds_left(case, small[case.name].report)
        row: Row = {
            "case": case.name,
            "network": case.network,
            "against": case.against,
            "batch": batch,
            "target": case.target.get(dtype),
            **machine(dtype=dtype),
            "versions": peers.versions,
            "absent": peers.absent | ({"ours": absent[case.name]} if case.name in absent else {}),
            "multiply_adds": {"peers": macs, "ours": left},
            "peak": peak,
            "seconds_first": first,
            "seconds": {n: t for n, t in times.to_dict().items() if n in chosen or n == case.name},
            "fastest": best,
        }
        if case.name in calls:
            row["speedup"] = times.ratio(best, case.name).to_dict()
            row["ideal"] = macs / left
            row["ours"] = decided(fast[case.name])
            if peak:
                row["share_of_peak"] = 2 * left / times[case.name].median / (peak[dtype] * threads)
        rows.append(row)
    return rows


def columns_by_layer(
    batch: int, dtype: str, threads: int, peak: dict[str, float], repeats: int, names: list[str] | None
) -> list[Row]:
    layers = []
    for layer in networks.ALEXNET_GROUPED:
        found = inference_layers.measure(layer, batch, dtype, threads, [1 / 15], [], peak, repeats, names)
        mine = next(iter(found["ours"].values()), None)
        layers.append({"layer": layer.name, "fastest": found["fastest"], "seconds": found["seconds"],
                       "absent": found["absent"], "versions": found["versions"],
                       **({"speedup": mine["speedup"], "ideal": 1 / mine["density"]} if mine else {})})  # fmt: skip
    return [mean_row("alexnet conv2-5, columns 1/15, mean of layers", layers, batch, dtype, peak)]


def pattern_by_layer(
    batch: int, dtype: str, threads: int, peak: dict[str, float], repeats: int, names: list[str] | None
) -> list[Row]:
    """Each convolution of the compacted network, on the input it has there, against the dense layer on its own."""
    dense, shape = networks.network("alexnet convs")
    x = torch.randn(batch, *shape)
    small = sa.compact(ssl_pattern_(copy.deepcopy(dense), SSL), x, columns="always")
    inputs: dict[str, dict[str, Tensor]] = {"dense": {}, "small": {}}

    def note(side: str, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[side][name] = args[0].contiguous()

        return hook

    for side, net in (("dense", dense), ("small", small)):
        hooks = [net.get_submodule(n).register_forward_pre_hook(note(side, n)) for n in networks.convs(dense)]
        net(x)
        for hook in hooks:
            hook.remove()
    layers = []
    for name, conv in networks.convs(dense).items():
        at, to = inputs["dense"][name], inputs["small"][name]
        peers = peers_of.build(conv, at, dtype, threads, only=names)
        row: Row = {"layer": f"alexnet {name}", "absent": peers.absent, "versions": peers.versions}
        layers.append(row)
        left = small.get_submodule(name)
        calls: dict[str, Callable[[], object]] = {}
        try:
            fast = ours(left, to, dtype, measured=False)
            peers_of.check(name, fast(to), left(to), dtype)
            calls["ours"] = lambda fast=fast, to=to: fast(to)
        except NotImplementedError as error:
            row["absent"] = row["absent"] | {"ours": str(error)}
        chosen, _ = inference_layers.contenders(peers.calls, {}, threads)
        times = interleave(
            {n: peers.calls[n] for n in chosen} | calls,
            warmup=0.02,
            repeats=repeats,
            min_time=0.008,
            settle=settle(threads),
        )
        row |= {"fastest": times.fastest(*chosen), "seconds": times.to_dict()}
        if calls:
            row["speedup"] = times.ratio(row["fastest"], "ours").to_dict()
            kept = small.report.layers[len(layers) - 1]
            row["ideal"] = kept.macs_before / kept.macs_after
    return [
        mean_row("alexnet conv1-5, pattern of SSL, mean of layers", layers, batch, dtype, peak),
        mean_row("alexnet conv2-5, pattern of SSL, mean of layers", layers[1:], batch, dtype, peak),
    ]


def mean_row(name: str, layers: list[Row], batch: int, dtype: str, peak: dict[str, float]) -> Row:
    row: Row = {
        "case": name,
        "network": "alexnet convs",
        "against": "dense",
        "batch": batch,
        "target": LAYER_CASES[name]["target"].get(dtype),
        **machine(dtype=dtype),
        "versions": layers[0]["versions"],
        "absent": layers[0]["absent"],
        "peak": peak,
        "layers": layers,
        "fastest": ", ".join(sorted({r["fastest"] for r in layers})),
    }
    if all("speedup" in r for r in layers):
        row["speedup"] = {k: fmean(r["speedup"][k] for r in layers) for k in ("median", "q1", "q3")}
        row["ideal"] = fmean(r["ideal"] for r in layers)
    return row


def key(row: Row) -> tuple[Any, ...]:
    return row["case"], row["batch"], row["dtype"], row["threads"]


def line(row: Row) -> str:
    head = f"{row['case']:48} batch {row['batch']:<3} {row['dtype']:4} {row['threads']} threads  "
    if "speedup" not in row:
        return head + f"not run: {row['absent']}"
    target = f", wanted {row['target']:g}" if row["target"] else ""
    return head + f"{row['speedup']['median']:6.2f}x over {row['fastest']} (ideal {row['ideal']:.2f}{target})"


def main() -> None:
    parser = arguments(__doc__ or "", repeats=11, threads=[1])
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"])
    parser.add_argument("--peers", nargs="+", help="only these peers")
    parser.add_argument("--again", action="store_true", help="measure rows that the JSON has")
    args = parser.parse_args()
    rows: list[Row] = kept(args.json)
    done = set() if args.again else {key(r) for r in rows}

    def add(new: list[Row]) -> None:
        nonlocal rows
        for row in new:
            print(line(row), flush=True)
            rows = [r for r in rows if key(r) != key(row)] + [row]
        keep((__doc__ or "").splitlines()[0], rows, args.json)

    def wanted(name: str) -> bool:
        return any(part in name for part in args.only)

    with torch.no_grad():
        peak = peaks()
        for threads in args.threads:
            torch.set_num_threads(threads)
            for dtype in args.dtype:
                for batch in args.batch:
                    to_do = [c for c in CASES if wanted(c.name) and batch in c.batches and dtype in c.dtypes
                             and (c.name, batch, dtype, threads) not in done]  # fmt: skip
                    more = (peak, args.repeats, args.peers)
                    # Peers on a smaller network are the case's own.
                    for at in dict.fromkeys(
                        (c.network, c.against, c.name if c.against == "smaller" else "") for c in to_do
                    ):
                        cases = [c for c in to_do if (c.network, c.against) == at[:2] and at[2] in ("", c.name)]
                        if at[0] != "alexnet convs" or SSL.exists():
                            add(group(cases, batch, dtype, threads, *more))
                    left = [n for n in LAYER_CASES if wanted(n) and (n, batch, dtype, threads) not in done]
                    if any("columns" in n for n in left):
                        add(columns_by_layer(batch, dtype, threads, *more))
                    if any("SSL" in n for n in left) and SSL.exists():
                        add(pattern_by_layer(batch, dtype, threads, *more))


if __name__ == "__main__":
    main()
