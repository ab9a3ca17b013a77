"""Renders bench/results/*.json as the tables of bench/results/README.md, so that no figure there is typed by hand.

    python bench/render.py

A benchmark whose JSON is absent is left out.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from structadmm.files import atomic_write_text

RESULTS = Path(__file__).parent / "results"
HEAD = """# Measured results

Rendered by `bench/render.py` from the JSON beside it. Ratios are medians over rounds in which both sides took turns in
one process, with the quartiles of the pairwise ratios in brackets. f32 throughout.
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


def main() -> None:
    text = HEAD
    parts: list[Callable[[dict[str, Any]], str]] = [main_job, project_update, admm_cost, conv_compact]
    for part in parts:
        path = RESULTS / f"{part.__name__}.json"
        if path.exists():
            text += part(json.loads(path.read_text()))
        if part is main_job:
            text += fresh_splits()
    atomic_write_text(RESULTS / "README.md", text)
    print(text)


if __name__ == "__main__":
    main()
