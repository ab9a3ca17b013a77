"""Renders bench/results/*.json as the tables of bench/results/README.md, so that no figure there is typed by hand.

    python bench/render.py

A benchmark whose JSON is absent is left out.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inference_layers as layer_scores
from structadmm.files import atomic_write_text

RESULTS = Path(__file__).parent / "results"
HEAD = """# Measured results

Rendered by `bench/render.py` from the JSON beside it. Ratios are medians over rounds in which both sides took turns in
one process, with the quartiles of the pairwise ratios in brackets. f32 unless a table says otherwise.
"""


def ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f}x [{spread['q1']:.2f}, {spread['q3']:.2f}]"


def machine(row: dict[str, Any]) -> str:
    return f"{row['cpu']}, {row['isa']}, torch {row['torch']}"


def table(title: str, command: str, note: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [f"\n## {title}\n", f"`{command}`", f"\n{note}\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def main_job(data: dict[str, Any]) -> str:
    s = data["summary"]
    wanted = {
        "accuracy lost, points": ("accuracy_lost", "at most 0.5", lambda v: f"{100 * v:.2f}"),
        "conv weights, times fewer": ("conv_weights_ratio", "at least 20", lambda v: f"{v:.1f}"),
        "multiply-adds, times fewer": ("multiply_adds_ratio", "at least 8", lambda v: f"{v:.1f}"),
        "file, times smaller": ("file_ratio", "", lambda v: f"{v:.1f}"),
        "times as fast, batch 1": ("speed_up_batch_1", "more than 1", lambda v: f"{v:.2f}"),
        "times as fast, batch 64": ("speed_up_batch_64", "more than 1", lambda v: f"{v:.2f}"),
        "dense test accuracy, %": ("dense_test_accuracy", "", lambda v: f"{100 * v:.2f}"),
        "pruned test accuracy, %": ("pruned_test_accuracy", "", lambda v: f"{100 * v:.2f}"),
        "seconds a seed": ("seconds", "under 240", lambda v: f"{v:.0f}"),
    }
    rows = [
        [name, *(f(s[key][k]) for k in ("mean", "min", "max")), target] for name, (key, target, f) in wanted.items()
    ]
    note = (
        f"Digits, residual net, seeds {', '.join(map(str, s['seeds']))}; one thread; latency against dense eager torch."
    )
    return table(
        "The main job", "python bench/main_job.py --seeds 0,1,2 --json bench/results/main_job.json",
        note, ["", "mean", "least", "most", "wanted"], rows,
    )  # fmt: skip


def fresh_splits() -> str:
    rows = []
    for path in sorted(RESULTS.glob("main_job_split*.json")):
        s = json.loads(path.read_text())["summary"]
        lost = s["accuracy_lost"]
        rows.append([
            path.stem.removeprefix("main_job_split"), f"{100 * s['dense_test_accuracy']['mean']:.2f}",
            f"{100 * s['pruned_test_accuracy']['mean']:.2f}",
            f"{100 * lost['mean']:.2f} ({100 * lost['min']:.2f} to {100 * lost['max']:.2f})",
            f"{s['conv_weights_ratio']['mean']:.1f}", f"{s['multiply_adds_ratio']['mean']:.1f}",
        ])  # fmt: skip
    note = (
        "While the recipe was tuned on the validation images, the test images' figures were in sight; so the finished "
        "recipe was run once on each of these splits into training, validation and test images, none of which had been "
        "used before. Means of seeds 0, 1, 2."
    )
    return table(
        "The main job on fresh splits",
        "python bench/main_job.py --split 1 --seeds 0,1,2 --json bench/results/main_job_split1.json",
        note,
        ["split", "dense, %", "pruned, %", "points lost", "conv weights, x fewer", "multiply-adds, x fewer"],
        rows,
    )


def project_update(data: dict[str, Any]) -> str:
    peers = ["torch.compile", "torch.compile, one graph", "eager"]
    rows = [
        [r["structure"], str(r["threads"]), f"{r['seconds']['structadmm']['median'] * 1e3:.1f} ms",
         f"{r['share_of_copy']:.0%} of {r['copy_GBps']:.0f} GB/s", *(ratio(r[f"speedup_over_{p}"]) for p in peers)]
        for r in data["rows"]
    ]  # fmt: skip
    note = (
        f"All conv weights of ResNet-50 ({data['rows'][0]['weights']:,}). {machine(data['rows'][0])}. Bytes counted: W "
        "and U twice, Z once, Z and U written once; more than 100 % of the copy because a layer is still in cache for "
        "its second pass. Peers: the same arithmetic in plain torch, compiled and called per layer as the op is, "
        "compiled as one graph over all 53 layers, and eager."
    )
    return table(
        "Fused project-and-update", "python bench/project_update.py --json bench/results/project_update.json",
        note, ["structure", "threads", "time", "bandwidth", *(f"faster than {p}" for p in peers)], rows,
    )  # fmt: skip


def admm_cost(data: dict[str, Any]) -> str:
    rows = [
        [str(r["threads"]), f"{r['seconds']['train']['median'] * 1e3:.0f} ms", f"{r['share_of_training_step']:.2%}",
         f"{r['share_of_hold_in_retraining']:.2%}"]
        for r in data["rows"]
    ]  # fmt: skip
    note = (
        f"ResNet-18/CIFAR, batch 128, column pruning. {machine(data['rows'][0])}. ADMM: the penalty gradient of every "
        "step and the iteration shared by an epoch's steps. Hold: zeros held in masked retraining."
    )
    return table(
        "ADMM's cost per optimizer step", "python bench/admm_cost.py --json bench/results/admm_cost.json",
        note, ["threads", "training step", "ADMM, share of it", "hold, share of it"], rows,
    )  # fmt: skip


def conv_compact(data: dict[str, Any]) -> str:
    kinds = [k for k in ("column", "block16", "block8", "block4") if k in data["rows"][0]]
    rows = [
        [f"{'x'.join(map(str, r['shape']))} -> {r['filters']}, {r['kernel']}x{r['kernel']}", str(r["threads"]),
         f"{r['density']:.2f}", r["fastest_dense"], *(ratio(r[k]["speedup"]) for k in kinds)]
        for r in data["rows"]
    ]  # fmt: skip
    note = (
        f"Speed-up over the fastest of torch's dense layouts (NCHW, channels-last, oneDNN-prepacked). "
        f"{machine(data['rows'][0])}. Ours counts everything: padded copy, kernel, the module's call."
    )
    return table(
        "CompactConv2d", "python bench/conv_compact.py --targets --threads 1 --json bench/results/conv_compact.json",
        note, ["layer", "threads", "density", "fastest dense", *kinds], rows,
    )  # fmt: skip


PEERS_NOTE = (
    "Peers: torch eager in NCHW and channels-last, oneDNN on reordered weights, torch.compile with freezing, ONNX "
    "Runtime, OpenVINO; in bf16 the same in bf16 (ONNX Runtime has no bf16 convolution on x86). Everybody takes f32 "
    "NCHW and leaves f32 NCHW and pays for what that costs; outputs are compared first."
)


def peaks(row: dict[str, Any]) -> str:
    if not row["peak"]:
        return "No C compiler was at hand, so no peak was measured."
    return (
        f"Peak of one thread, measured in the same run: {row['peak']['f32'] / 1e9:.0f} GFLOP/s f32, "
        f"{row['peak']['bf16'] / 1e9:.0f} GFLOP/s bf16."
    )


def left_out(rows: list[dict[str, Any]]) -> str:
    reasons = sorted({f"{name}: {why}" for r in rows for name, why in r["absent"].items()})
    return " Left out: " + "; ".join(reasons) + "." if reasons else ""


def versions(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{k} {v.split('-')[0]}" for k, v in sorted(rows[-1]["versions"].items()))


def on(file: str) -> str:
    """What a title says of a file of another machine, whose instruction set the file is named after."""
    isa = file.removeprefix("inference_networks").removeprefix("inference_layers").removeprefix("latency_plans")
    return f", {isa.lstrip('_').replace('_', ' ')}" if isa else ""


def met(value: float, target: float | None) -> str:
    return "" if target is None else f"{target:g}: {'yes' if value >= target else 'no'}"


def inference_networks(data: dict[str, Any], file: str = "inference_networks") -> str:
    ordered = sorted(data["rows"], key=lambda r: (r["threads"], r["dtype"] != "f32"))
    rows = [
        [r["case"], str(r["batch"]), r["dtype"], str(r["threads"]), *time_of(r), r["fastest"], ratio(r["speedup"]),
         f"{r['ideal']:.2f}x", met(r["speedup"]["median"], r["target"])]
        for r in ordered if "speedup" in r and not r["case"].startswith("sweep")
    ]  # fmt: skip
    if not rows:
        return ""
    note = (
        f"Pruned networks against the dense network on the fastest peer; where only filters went, against OpenVINO and "
        f"ONNX Runtime on the same smaller network. {PEERS_NOTE} Ideal: multiply-adds, before over after. "
        f"{machine(ordered[0])}, {versions(ordered)}. {peaks(ordered[0])}{left_out(ordered)}"
    )
    head = ["case", "batch", "dtype", "threads", "peer, ms", "ours, ms", "fastest peer", "faster", "ideal", "wanted"]
    command = f"python bench/inference_networks.py --json bench/results/{file}.json"
    return table(f"Networks{on(file)}", command, note, head, rows) + sweep(ordered, command, on(file))


def time_of(row: dict[str, Any]) -> list[str]:
    if "layers" in row:
        return ["", ""]
    return [f"{1e3 * row['seconds'][name]['median']:.3f}" for name in (row["fastest"], row["case"])]


def sweep(ordered: list[dict[str, Any]], command: str, where: str) -> str:
    found = [r for r in ordered if r["case"].startswith("sweep") and "speedup" in r]
    kinds = sorted({(r["batch"], r["threads"]) for r in found})
    if not found:
        return ""
    densities = sorted({float(r["case"].split()[-1]) for r in found})
    at = {(float(r["case"].split()[-1]), r["batch"], r["threads"]): r for r in found}
    rows = [[f"{d:g}", *(ratio(at[(d, *k)]["speedup"]) if (d, *k) in at else "" for k in kinds)] for d in densities]
    worst = min(found, key=lambda r: r["speedup"]["median"])
    note = (
        f"ResNet-18/CIFAR with this share of columns in all convolutions but the first, over the fastest form of torch "
        f"of the dense network. Worst: {worst['speedup']['median']:.3f}x, wanted 0.98."
    )
    head = ["density", *(f"batch {b}, {t} thread{'s' * (t > 1)}" for b, t in kinds)]
    return table(f"No network slower than torch's: density sweep{where}", command, note, head, rows)


def inference_layers(data: dict[str, Any], file: str = "inference_layers") -> str:
    found = sorted(data["rows"], key=lambda r: (r["dtype"] != "f32", r["batch"]))
    wanted = {"f32": (1.0, 0.75), "bf16": (1.2, 0.8)}
    overall = [
        [s["dtype"], str(s["threads"]), str(s["batch"] or "all"), str(s["cases"]), f"{s['geometric_mean']:.2f}",
         met(s["geometric_mean"], wanted[s["dtype"]][0]), f"{s['least']:.2f}", met(s["least"], wanted[s["dtype"]][1]),
         s["least_at"]]
        for s in layer_scores.summary(found)
    ]  # fmt: skip
    if not overall:
        return ""
    command = f"python bench/inference_layers.py --json bench/results/{file}.json"
    note = (
        f"Score: (fastest dense peer's time x density left) / ours, column sparsity at densities 0.5, 0.25, 0.1 and "
        f"1/15. {PEERS_NOTE} {machine(found[0])}, {versions(found)}. {peaks(found[0])}{left_out(found)}"
    )
    head = ["dtype", "threads", "batch", "cases", "geometric mean", "wanted", "least", "wanted", "least at"]
    text = table(f"Layers: score against the ideal{on(file)}", command, note, head, overall)
    for dtype in ("f32", "bf16"):
        part = [r for r in found if r["dtype"] == dtype and r["threads"] == 1]
        names = [n for n in (part[0]["ours"] if part else {}) if n.startswith("column")]
        if not names:
            continue
        rows = [
            [r["layer"], str(r["batch"]), f"{1e6 * r['seconds'][r['fastest']]['median']:.0f}", r["fastest"],
             f"{r['dense_gflops']:.0f}", *(score(r["ours"].get(n)) for n in names)]
            for r in part
        ]  # fmt: skip
        note = (
            f"{dtype}, one thread. Of each density: speed-up, score, share of the peak reached by the multiply-adds "
            f"that are left; in italics the score against peers that keep their own layout and dtype on both sides and "
            f"so pay for no change, and *output* where merely filling the output would take more than half of our time."
        )
        head = ["layer", "batch", "dense, us", "fastest peer", "GFLOP/s", *(n.replace("column ", "") for n in names)]
        text += table(f"Layers, {dtype}{on(file)}", command, note, head, rows)
    return text + blocks(found, file) + scaling(found, on(file))


def score(v: dict[str, Any] | None) -> str:
    if v is None:
        return ""
    fill = ", output" if v["fill_share"] > 0.5 else ""
    against_native = f"*{v['score_with_native']:.2f}{fill}*"
    return f"{v['speedup']['median']:.1f}x **{v['score']:.2f}** {v['share_of_peak']:.0%} {against_native}"


def blocks(found: list[dict[str, Any]], file: str) -> str:
    """Block-column's time over column's, by dtype and block size."""
    slower: dict[tuple[str, int, str, int], list[tuple[float, str]]] = {}
    for r in found:
        for name, v in r["ours"].items():
            kind, density = name.split()
            column = r["ours"].get(f"column {density}")
            if kind.startswith("block") and column:
                at = (r["dtype"], r["threads"], density, int(kind.removeprefix("block")))
                # Both have the same density, so times compare as scores do.
                times = v["seconds"] / column["seconds"] * column["density"] / v["density"]
                slower.setdefault(at, []).append((times, f"{r['layer']}, batch {r['batch']}"))
    if not slower:
        return ""
    rows = []
    for (dtype, threads, density, block), times in sorted(slower.items(), key=lambda i: (i[0][0] != "f32", *i[0][1:])):
        mean = math.exp(sum(math.log(t) for t, _ in times) / len(times))
        rows.append([dtype, str(threads), density, str(block), str(len(times)), f"{mean:.2f}", f"{max(times)[0]:.2f}",
                     max(times)[1]])  # fmt: skip
    note = "Time of block-column sparsity over that of column sparsity at the same density: geometric mean and worst."
    head = ["dtype", "threads", "density", "filters in a block", "cases", "mean", "worst", "worst at"]
    command = f"python bench/inference_layers.py --density 0.1 --blocks 4 8 16 32 64 --json bench/results/{file}.json"
    return table(f"Block-columns against columns{on(file)}", command, note, head, rows)


def scaling(found: list[dict[str, Any]], where: str) -> str:
    """One thread's time over two threads' on the same layer, ours and the fastest peer's."""
    at = {(r["layer"], r["batch"], r["dtype"], r["threads"]): r for r in found}
    rows = []
    for dtype, batch in sorted({(r["dtype"], r["batch"]) for r in found}, key=lambda k: (k[0] != "f32", k[1])):
        ours, peers = [], []
        for (layer, b, d, threads), one in at.items():
            two = at.get((layer, b, d, 2))
            if (b, d, threads) != (batch, dtype, 1) or two is None:
                continue
            peers.append(one["seconds"][one["fastest"]]["median"] / two["seconds"][two["fastest"]]["median"])
            ours += [v["seconds"] / two["ours"][n]["seconds"] for n, v in one["ours"].items() if n in two["ours"]]
        if ours:
            means = [math.exp(sum(map(math.log, t)) / len(t)) for t in (ours, peers)]
            rows.append([dtype, str(batch), str(len(ours)), f"{means[0]:.2f}", f"{min(ours):.2f}", f"{means[1]:.2f}"])
    if not rows:
        return ""
    head = ["dtype", "batch", "cases", "ours, mean", "ours, least", "fastest peer, mean"]
    note = "Time with one thread over time with two, in separate runs: geometric means over layers and densities."
    command = "python bench/inference_layers.py --threads 1 2 --json bench/results/inference_layers.json"
    return table(f"Two threads{where}", command, note, head, rows)


def latency_plans(data: dict[str, Any], file: str = "latency_plans") -> str:
    rows = [
        [r["case"], f"{r['target']:g}x", f"{r['predicted']:.2f}x", ratio(r["measured"]), f"{100 * r['error']:+.1f} %",
         f"{1e3 * r['seconds']['dense']['median']:.2f}", f"{1e3 * r['seconds']['small']['median']:.2f}",
         " / ".join(r["runs_as"])]
        for r in data["rows"]
    ]  # fmt: skip
    worst = max(abs(r["error"]) for r in data["rows"])
    note = (
        f"Speed-up at batch 1, one thread, f32: as predicted (what the last trial of the plan found, in segments), and "
        f"as measured afterwards on the network pruned once as planned and compacted, against the dense network; both "
        f"as `optimize` runs them, in turns. "
        f"Largest error {worst:.1%}, wanted at most 15 %. {machine(data['rows'][0])}."
    )
    head = ["case", "asked for", "predicted", "measured", "error", "dense, ms", "pruned, ms", "run as"]
    command = f"python bench/latency_plans.py --json bench/results/{file}.json"
    return table(f"Latency plans{on(file)}", command, note, head, rows)


def zoo(data: dict[str, Any]) -> str:
    """Per set of models: how many hold at every rate they were tried at, and the largest difference."""
    sets: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, row in data.items():
        model = name.rsplit(" ", 1)[0]
        kind, _, _ = model.partition("/")
        sets.setdefault(kind, {}).setdefault(model, []).append(row)
    rows = []
    for kind, models in sorted(sets.items()):
        every = [r for found in models.values() for r in found]
        both = sum(len(found) == 2 and all(r.get("ok") for r in found) for found in models.values())
        rows.append([
            kind, str(len(models)), str(both), str(sum(not r.get("ok") for r in every)),
            *(f"{max((r.get(key, 0.0) for r in every), default=0.0):.1e}" for key in ("float32", "float64")),
            f"{max(r.get('seconds_graph', 0.0) for r in every):.1f}",
        ])  # fmt: skip
    head = ["models", "tried", "hold at 30 and 70 %", "rows that fail", "largest difference, float32", "float64",
            "slowest graph, s of processor"]  # fmt: skip
    note = (
        "Random zero filters and columns; the compacted network against the masked one, relative to the largest "
        "output. Rows are of the versions at which each was run last."
    )
    return table("Compaction of the model zoos", "python bench/zoo.py", note, head, rows)


def main() -> None:
    text = HEAD
    parts: list[Callable[..., str]] = [
        main_job,
        project_update,
        admm_cost,
        conv_compact,
        inference_networks,
        inference_layers,
        latency_plans,
        zoo,
    ]
    for part in parts:
        path = RESULTS / f"{part.__name__}.json"
        if path.exists():
            text += part(json.loads(path.read_text()))
        if part in (inference_networks, inference_layers, latency_plans):
            for other in sorted(RESULTS.glob(f"{part.__name__}_*.json")):
                text += part(json.loads(other.read_text()), other.stem)
        if part is main_job:
            text += fresh_splits()
    atomic_write_text(RESULTS / "README.md", text)
    print(text)


if __name__ == "__main__":
    main()
