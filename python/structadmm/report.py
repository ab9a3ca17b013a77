"""A run's result as one HTML file that needs nothing else: figures are inlined as SVG, nothing is fetched, and it reads
in light and in dark.
"""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Sequence
from typing import Any

from .files import atomic_write_text

# Two lines are told apart by hue and lightness, also without colour vision and on light and dark ground (Okabe and
# Ito's set, a little muted).
COLOURS = ("#3d8fd1", "#e0892c", "#2ba37a", "#cc6aa0", "#9b7fd4", "#b0a13a", "#5fb6d9", "#d0604c")
# matplotlib writes this colour for everything that the page's own text colour should take.
_INK = "#012345"


def write_report(results: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write the report of one run, or of several seeds of one recipe, whole or not at all. results: what Run.execute
    returned.
    """
    atomic_write_text(path, render(results))


def render(results: Sequence[dict[str, Any]]) -> str:
    """The page as text. The figures are of the first seed. Without matplotlib it has the tables alone, and says so."""
    r = results[0]
    several = len(results) > 1
    title = f"{r['recipe']}: pruned by ADMM, compacted, measured"
    body = [
        f"<header><p class=over>structadmm run {_t(r['recipe'])}</p><h1>{_headline(results)}</h1>"
        f"<p class=lead>{_t(r['dataset'])}. Seed{'s' if several else ''} {', '.join(str(x['seed']) for x in results)}; "
        f"{_t(r['environment']['threads'])} thread{'s' * (r['environment']['threads'] != 1)} of "
        f"{_t(r['environment']['cpu'])}. "
        f"{'The slowest seed took' if several else 'The run took'} {max(x['seconds'] for x in results) / 60:.1f} "
        f"minutes.</p></header>",
        _cards(results),
        _section("Dense against pruned", _main_table(results)),
    ]
    if several:
        body.append(_section("Seed by seed", _seed_table(results)))
    figures = _figures(r)
    which = f" (seed {r['seed']})" if several else ""
    if figures:
        accuracy, residuals, kept = figures
        last = r["iterations"][-1] if r["iterations"] else None
        body += [
            _section(
                f"Accuracy over the run{which}",
                f"<figure>{accuracy}<figcaption>Accuracy on the validation split after every epoch; bands are the "
                f"stages. It is the network as it stood, so during "
                "an ADMM stage it is not pruned yet, and at the first epoch of a retraining stage it has just been "
                "cut. The dashed line is the dense network; the lowest few "
                "points, such as the first epochs, may lie below the axis. "
                "The test images take no part in this figure.</figcaption></figure>",
            ),
        ]
        if residuals:
            body.append(
                _section(
                    f"ADMM residuals{which}",
                    f"<figure>{residuals}<figcaption>Left: primal residual ||W &minus; Z|| and dual residual "
                    f"&rho;||Z&prime; &minus; Z|| over all pruned layers, one point "
                    "per ADMM iteration; dotted lines separate the rounds. Right: how far each layer's weights are "
                    "from their structured copy, relative to their norm"
                    + (f"; at the end {max(last['relative'].values()):.1%} for the worst layer." if last else ".")
                    + "</figcaption></figure>",
                )
            )
        body.append(
            _section(
                f"What is left, layer by layer{which}",
                f"<figure>{kept}<figcaption>Share of filters (rows of the GEMM matrix) and columns (input channel and "
                f"kernel position) that still hold a weight after "
                "purification and unused-path removal; numbers are kept of all. A layer without a bar is "
                "gone.</figcaption></figure>" + _layer_table(r),
            )
        )
    else:
        body.append(
            _section(
                f"What is left, layer by layer{which}",
                _layer_table(r) + "<p>Figures need matplotlib: pip install structadmm[demo]</p>",
            )
        )
    body += [
        _section(f"After the training{which}", _step_table(r) + _checks(r)),
        _section("The plan", f"<pre>{_t(r['plan'])}</pre>" + _settings(r)),
        _section(f"Compaction{which}", f"<pre>{_t(r['compact'])}</pre>"),
        _section("Environment", _pairs(r["environment"])),
    ]
    return "\n".join([_HEAD.format(title=_t(title), css=_CSS), *body, "</main>\n</body>\n</html>\n"])


_HEAD = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>"""

_CSS = """
:root { --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color-scheme: light dark; --ink: #1c2430;
  --soft: #5a6675; --line: #d9dfe6; --card: #f4f6f9; --page: #fff; --good: #1b7f5c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --soft: #9aa7b6; --line: #333d49; --card: #1b222b;
  --page: #12171d; --good: #58c79b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { margin-bottom: 1.75rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: .2rem 0 .6rem; letter-spacing: -.015em;
  text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 0 0 .8rem; }
section { margin-top: 2.6rem; }
.over { margin: 0; color: var(--soft); font: .85rem var(--mono); }
.lead, figcaption, .note { color: var(--soft); }
.lead { margin: 0; max-width: 48rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; }
.card { background: var(--card); border-radius: .6rem; padding: .9rem 1rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.2; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small { color: var(--soft); }
tr.sum td { border-top: 2px solid var(--line); font-weight: 600; }
td.gain { font-weight: 600; color: var(--good); }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
figcaption { font-size: .88rem; margin-top: .6rem; max-width: 52rem; }
figure + .scroll { margin-top: 1.2rem; }
pre { background: var(--card); border-radius: .6rem; padding: .9rem 1rem; overflow-x: auto;
  font: .78rem/1.45 var(--mono); }
details { margin-top: .6rem; } summary { cursor: pointer; color: var(--soft); }
.note { font-size: .9rem; }
"""


def _t(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], last_is_sum: bool = False) -> str:
    """Cells are HTML; a cell that begins with '+' is a gain, shown so."""
    out = ["<div class=scroll><table><thead><tr>", *(f"<th>{h}</th>" for h in head), "</tr></thead><tbody>"]
    for i, row in enumerate(rows):
        out.append("<tr class=sum>" if last_is_sum and i == len(rows) - 1 else "<tr>")
        out += [f"<td class=gain>{c[1:]}</td>" if c.startswith("+") else f"<td>{c}</td>" for c in row]
        out.append("</tr>")
    return "".join([*out, "</tbody></table></div>"])


def _mean(results: Sequence[dict[str, Any]], *path: str) -> float:
    """Mean over the runs of the number at result[path[0]][path[1]]..."""
    return sum(_at(r, *path) for r in results) / len(results)


def _at(result: Any, *path: str) -> float:
    for key in path:
        result = result[key]
    return float(result)


def seconds_text(s: float) -> str:
    """A duration in the unit that suits it."""
    return f"{s * 1e6:.0f} \u00b5s" if s < 1e-3 else f"{s * 1e3:.2f} ms" if s < 1 else f"{s:.1f} s"


def bytes_text(n: float) -> str:
    """A size in the unit that suits it."""
    return f"{n / 1e6:.2f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"


def _headline(results: Sequence[dict[str, Any]]) -> str:
    weights = _mean(results, "conv_weights_ratio")
    macs = _mean(results, "multiply_adds_ratio")
    lost = _mean(results, "accuracy_lost") * 100
    moved = (
        f"{lost:.2f} points of test accuracy lost"
        if lost > 0.005
        else "no test accuracy lost"
        if lost > -0.005
        else f"{-lost:.2f} points of test accuracy won"
    )
    return f"{weights:.1f}&times; fewer conv weights, {macs:.1f}&times; fewer multiply-adds, {moved}"


def _cards(results: Sequence[dict[str, Any]]) -> str:
    cards = [
        (
            f"{_mean(results, 'pruned', 'test_accuracy'):.2%}",
            f"test accuracy, dense {_mean(results, 'dense', 'test_accuracy'):.2%}",
        ),
        (f"{_mean(results, 'conv_weights_ratio'):.1f}&times;", "fewer conv weights"),
        (f"{_mean(results, 'multiply_adds_ratio'):.1f}&times;", "fewer multiply-adds"),
    ]
    for b in results[0]["speed_up"]:
        cards.append(
            (
                f"{_mean(results, 'speed_up', b, 'median'):.2f}&times;",
                f"as fast as dense at batch {_t(b)}",
            )
        )
    return (
        "<div class=cards>"
        + "".join(f"<div class=card><b>{v}</b><span>{what}</span></div>" for v, what in cards)
        + "</div>"
    )


def _main_table(results: Sequence[dict[str, Any]]) -> str:
    def mean(*path: str) -> float:
        return _mean(results, *path)

    lost = _mean(results, "accuracy_lost") * 100
    rows = [
        [
            "Test accuracy",
            f"{mean('dense', 'test_accuracy'):.2%}",
            f"{mean('pruned', 'test_accuracy'):.2%}",
            f"{-lost:+.2f} points".replace("-", "&minus;").replace("+", "&plus;"),
        ],
        [
            "Conv weights",
            f"{mean('dense', 'conv_weights'):,.0f}",
            f"{mean('pruned', 'conv_weights'):,.0f}",
            f"+{_mean(results, 'conv_weights_ratio'):.1f}&times; fewer",
        ],
        [
            "Multiply-adds per image",
            f"{mean('dense', 'multiply_adds'):,.0f}",
            f"{mean('pruned', 'multiply_adds'):,.0f}",
            f"+{_mean(results, 'multiply_adds_ratio'):.1f}&times; fewer",
        ],
        [
            "File",
            bytes_text(mean("dense", "file_bytes")),
            bytes_text(mean("pruned", "file_bytes")),
            f"+{_mean(results, 'file_ratio'):.1f}&times; smaller",
        ],
    ]
    for b in results[0]["speed_up"]:
        cells = [f"Latency, batch {_t(b)}"]
        for which in ("dense", "pruned"):
            part = {k: _mean(results, which, "latency_seconds", b, k) for k in ("median", "q1", "q3")}
            cells.append(
                f"{seconds_text(part['median'])} <small>({seconds_text(part['q1'])} to "
                f"{seconds_text(part['q3'])})</small>"
            )
        ratio = _mean(results, "speed_up", b, "median")
        rows.append([*cells, f"+{ratio:.2f}&times; as fast" if ratio > 1 else f"{ratio:.2f}&times; as fast"])
    note = (
        "<p class=note>Dense: the network trained in the same run, in eager torch. Pruned: the file written by this "
        "run, loaded again. Latency: median (quartiles) of rounds in which both "
        "take turns in one process. Multiply-adds: every stored weight of conv and linear layers once per output "
        "position. The test images were used for this table only.</p>"
    )
    head = ["mean of the seeds" if len(results) > 1 else "", "dense", "pruned", ""]
    return _table(head, rows) + note


def _seed_table(results: Sequence[dict[str, Any]]) -> str:
    batches = list(results[0]["speed_up"])
    speeds = [f"batch {b}" for b in batches]
    head = ["seed", "dense", "pruned", "lost", "conv weights", "multiply-adds", *speeds, "minutes"]

    def row(name: str, runs: Sequence[dict[str, Any]]) -> list[str]:
        return [
            name,
            f"{_mean(runs, 'dense', 'test_accuracy'):.2%}",
            f"{_mean(runs, 'pruned', 'test_accuracy'):.2%}",
            f"{_mean(runs, 'accuracy_lost') * 100:.2f}".replace("-", "&minus;"),
            f"{_mean(runs, 'conv_weights_ratio'):.1f}&times;",
            f"{_mean(runs, 'multiply_adds_ratio'):.1f}&times;",
            *(f"{_mean(runs, 'speed_up', b, 'median'):.2f}&times;" for b in batches),
            f"{_mean(runs, 'seconds') / 60:.1f}",
        ]

    rows = [row(str(r["seed"]), [r]) for r in results]
    return _table(head, [*rows, row("mean", results)], last_is_sum=True)


def _layer_table(r: dict[str, Any]) -> str:
    rows = []
    for x in r["layers"]:
        rows.append(
            [
                f"<code>{_t(x['name'])}</code>",
                "&times;".join(map(str, x["shape"])),
                f"{x['filters_kept']} / {x['filters']}",
                f"{x['columns_kept']} / {x['columns']}",
                f"{x['weights_kept']:,} / {x['weights']:,}",
                f"{x['weights'] / x['weights_kept']:.1f}&times;" if x["weights_kept"] else "gone",
            ]
        )
    return _table(["layer", "shape", "filters", "columns", "weights", "fewer"], rows)


def _step_table(r: dict[str, Any]) -> str:
    rows = [[_t(s["step"]), f"{s['conv_weights']:,}", f"{s['val_accuracy']:.2%}"] for s in r["steps"]]
    return _table(["step", "nonzero conv weights", "validation accuracy"], rows)


def _checks(r: dict[str, Any]) -> str:
    return (
        f"<p class=note>On all validation and test images the compacted network's outputs differ from the masked "
        f"network's by at most {r['compact_difference']:.1e}, "
        f"and the reloaded file's from the saved one's by at most {r['reload_difference']:.1e}.</p>"
    )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in table.items():
        if key == "plan":
            continue
        if isinstance(value, dict) and value:
            out.update(_flat(value, f"{prefix}{key}."))
        elif value not in (None, {}):
            out[prefix + key] = str(value)
    return out


def _pairs(table: dict[str, Any]) -> str:
    return _table(["", ""], [[_t(k), _t(v)] for k, v in table.items()])


def _settings(r: dict[str, Any]) -> str:
    return f"<details><summary>All settings of the recipe</summary>{_pairs(_flat(r['settings']))}</details>"


# Figures


def _figures(r: dict[str, Any]) -> tuple[str, str, str] | None:
    try:
        import matplotlib
    except ImportError:
        return None
    style: Any = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "axes.titlesize": 10,
        "axes.titlecolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "text.color": _INK,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "axes.grid": True,
        "grid.color": _INK,
        "grid.alpha": 0.12,
        "grid.linewidth": 0.6,
    }
    with matplotlib.rc_context(style):
        return _accuracy_figure(r), _residual_figure(r), _kept_figure(r)


def _svg(figure: Any, name: str, label: str) -> str:
    """The figure as an inline SVG element: no prolog, no metadata, the page's text colour and font."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(
        r'<svg[^>]*? viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{label}">',
        text,
        count=1,
        flags=re.S,
    )
    # Identifiers are per document, and three figures share this one.
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text).replace("xlink:href", "href")
    text = re.sub(r"font: (\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    return text.replace(_INK, "currentColor")


def _figure(width: float, height: float, columns: int = 1) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _accuracy_figure(r: dict[str, Any]) -> str:
    figure, (axis,) = _figure(9.5, 3.4)
    history = r["history"]
    x = list(range(1, len(history) + 1))
    y = [100 * h["val_accuracy"] for h in history]
    start = 0
    for i, stage in enumerate(r["stages"]):
        end = start + sum(h["stage"] == stage["name"] for h in history)
        if end > start:
            if i % 2:
                axis.axvspan(start + 0.5, end + 0.5, color=_INK, alpha=0.06, linewidth=0)
            axis.text(
                (start + end) / 2 + 0.5,
                1.02,
                _stage_label(stage["name"]),
                ha="center",
                va="bottom",
                fontsize=8.5,
                transform=axis.get_xaxis_transform(),
            )
        start = end
    axis.plot(x, y, color=COLOURS[0])
    dense = 100 * r["dense"]["val_accuracy"]
    axis.axhline(
        dense, color=COLOURS[1], linestyle="--", linewidth=1.2, label=f"dense, {r['dense']['val_accuracy']:.2%}"
    )
    # The first epochs and the moments after a cut may fall to chance; the axis shows where the run spent its time.
    lowest = min([dense, *sorted(y)[len(y) // 25 :]])
    margin = max(100 - lowest, 0.5) * 0.08
    axis.set_ylim(lowest - margin, 100 + margin)
    axis.set_xlim(0.5, max(len(history), 1) + 0.5)
    axis.set_xlabel("epoch of the run")
    axis.set_ylabel("validation accuracy, %")
    axis.legend(loc="lower right")
    return _svg(figure, "accuracy", "Validation accuracy after every epoch")


def _stage_label(name: str) -> str:
    kind, _, number = name.partition("-")
    return {"admm": "ADMM", "retrain": "retrain", "train": "dense"}.get(kind, kind) + (f" {number}" if number else "")


def _residual_figure(r: dict[str, Any]) -> str:
    iterations = r["iterations"]
    if not iterations:
        return ""
    figure, (left, right) = _figure(9.5, 3.6, 2)
    rounds = [it["round"] for it in iterations]
    for axis in (left, right):
        for i in range(1, len(rounds)):
            if rounds[i] != rounds[i - 1]:
                axis.axvline(i + 0.5, color=_INK, linestyle=":", linewidth=1, alpha=0.6)
        axis.set_yscale("log")
        axis.set_xlabel("ADMM iteration, all rounds")
        axis.set_xlim(0.5, len(rounds) + 0.5)

    def draw(axis: Any, values: Sequence[float], **style: Any) -> None:
        for which in sorted(set(rounds)):  # a line per round: the jump between rounds is no step of ADMM
            points = [(i + 1, v) for i, v in enumerate(values) if rounds[i] == which and v > 0]
            axis.plot([p[0] for p in points], [p[1] for p in points], markersize=3, **style)
            style["label"] = None

    draw(left, [it["primal"] for it in iterations], color=COLOURS[0], marker="o", label="primal ||W \u2212 Z||")
    draw(left, [it["dual"] for it in iterations], color=COLOURS[1], marker="s", label="dual \u03c1||Z\u2032 \u2212 Z||")
    left.set_title("residuals over all layers", loc="left")
    left.legend(loc="best", fontsize=8.5)
    names = list(iterations[-1]["relative"])
    for colour, marker, name in zip(COLOURS, "os^Dvx*P", names, strict=False):
        values = [it["relative"].get(name, 0.0) for it in iterations]
        draw(right, values, color=colour, marker=marker, linewidth=1.2, label=name)
    if len(names) > len(COLOURS):
        worst = [max(it["relative"].values()) for it in iterations]
        draw(right, worst, color=_INK, linestyle="--", linewidth=1.2, label=f"worst of {len(names)} layers")
    right.set_title("||W \u2212 Z|| / ||W|| by layer", loc="left")
    right.legend(loc="best", fontsize=7.5)
    return _svg(figure, "residuals", "ADMM residuals per iteration")


def _kept_figure(r: dict[str, Any]) -> str:
    layers = r["layers"]
    figure, (axis,) = _figure(9.5, 0.9 + 0.52 * len(layers))
    for k, (key, label) in enumerate((("filters", "filters"), ("columns", "columns"))):
        share = [100 * x[f"{key}_kept"] / x[key] for x in layers]
        at = [i + (k - 0.5) * 0.38 for i in range(len(layers))]
        axis.barh(at, share, 0.34, color=COLOURS[k], label=label)
        for y, s, x in zip(at, share, layers, strict=True):
            axis.text(s + 0.8, y, f"{x[f'{key}_kept']} of {x[key]}", va="center", fontsize=8)
    axis.set_yticks(range(len(layers)), [x["name"] for x in layers])
    axis.invert_yaxis()
    axis.set_xlim(0, 112)
    axis.set_xticks(range(0, 101, 20))
    axis.set_xlabel("kept, %")
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return _svg(figure, "kept", "Filters and columns kept per layer")
