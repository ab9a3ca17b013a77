"""Draws bench/results/inference_*.json: the plots of the README, as SVG beside the JSON.

    python bench/plot.py

Needs matplotlib. A benchmark whose JSON is absent is left out.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

from timing import kept  # noqa: E402

RESULTS = Path(__file__).parent / "results"
COLOURS = {"f32": "#1f77b4", "bf16": "#d62728"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "structadmm",  # the same file from the same figures
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def save(figure: Any, name: str) -> None:
    figure.savefig(RESULTS / name, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    print(f"wrote {RESULTS / name}")


def scores(rows: list[dict[str, Any]]) -> None:
    """Every layer's score, sorted, one thread: how much of the ideal is reached, and where it isn't."""
    figure, axes = plt.subplots(figsize=(6, 2.8))
    for dtype, colour in COLOURS.items():
        for batch, line in ((1, "-"), (16, "--")):
            found = sorted(
                v["score"]
                for r in rows
                if (r["dtype"], r["batch"], r["threads"]) == (dtype, batch, 1)
                for name, v in r["ours"].items()
                if name.startswith("column")
            )
            if found:
                share = [100 * (i + 0.5) / len(found) for i in range(len(found))]
                axes.plot(share, found, line, color=colour, label=f"{dtype}, batch {batch}")
    axes.axhline(1, color="black", lw=0.8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.set_xlabel("% of layers and densities")
    axes.set_ylabel("score (1: sparsity lost nothing)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
        save(figure, "layers.svg")
    plt.close(figure)


def sweep(rows: list[dict[str, Any]]) -> None:
    """Speed-up over the fastest form of torch, by density."""
    figure, axes = plt.subplots(figsize=(4.2, 2.8))
    found = [r for r in rows if r["case"].startswith("sweep") and "speedup" in r and r["threads"] == 1]
    for batch, line in ((1, "-"), (16, "--")):
        points = sorted((float(r["case"].split()[-1]), r["speedup"]["median"], r["ideal"]) for r in found
                        if r["batch"] == batch)  # fmt: skip
        if points:
            density, faster, ideal = zip(*points, strict=True)
            axes.plot(density, faster, line, marker="o", ms=3, color=COLOURS["f32"], label=f"ours, batch {batch}")
            axes.plot(density, ideal, ":", color="grey", label="multiply-adds" if batch == 1 else None)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.set_xlabel("share of columns left, ResNet-18/CIFAR, f32")
    axes.set_ylabel("times as fast as torch")
    if found:
        axes.legend(frameon=False)
        save(figure, "sweep.svg")
    plt.close(figure)


def networks(rows: list[dict[str, Any]]) -> None:
    """Speed-up of each pruned network over the fastest peer, with what multiply-adds alone would give."""
    found = [r for r in rows if "speedup" in r and r["threads"] == 1 and r["against"] == "dense"]
    if not found:
        return
    found.sort(key=lambda r: (r["case"], r["batch"], r["dtype"]))
    figure, axes = plt.subplots(figsize=(6, 0.25 * len(found) + 0.6))
    for i, r in enumerate(found):
        axes.barh(-i, r["speedup"]["median"], color=COLOURS[r["dtype"]], height=0.7)
        axes.plot([r["ideal"]] * 2, [-i - 0.35, -i + 0.35], color="black", lw=1)
        axes.text(r["speedup"]["median"], -i, f" {r['speedup']['median']:.1f}x", va="center", fontsize=7)
    axes.set_yticks(
        [-i for i in range(len(found))], [f"{r['case']}, {r['dtype']}, batch {r['batch']}" for r in found], fontsize=7
    )
    axes.set_xlabel("times as fast as the fastest dense peer (bar: by multiply-adds)")
    save(figure, "networks.svg")


def main() -> None:
    with plt.rc_context(STYLE):
        scores(kept(RESULTS / "inference_layers.json"))
        rows = kept(RESULTS / "inference_networks.json")
        sweep(rows)
        networks(rows)


if __name__ == "__main__":
    main()
