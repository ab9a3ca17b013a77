"""The command line: results, --json on stdout alone, one-line errors, exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from typer.testing import CliRunner

import structadmm
from structadmm import artefact, layers
from structadmm.cli import app
from structadmm.nn import CompactConv2d, CompactLinear

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.c = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        y = torch.relu(self.b(torch.relu(self.a(x))))
        return self.fc((y + self.c(y)).mean((2, 3)))

def make():
    return Net()

def wrong():
    return 3

def other():
    return nn.Linear(4, 4)

def half():
    return Net().bfloat16()

def fails():
    raise RuntimeError("no luck\\ntoday")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model file, weights in which filter 3 of a is zero, and artefacts of it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "nets.py").write_text(MODEL)
    names: dict = {}
    exec(MODEL, names)
    torch.manual_seed(0)
    model = names["make"]()
    model.a.weight.data[3] = 0
    model.a.bias.data[3] = 0
    torch.save(model.state_dict(), folder / "weights.pt")
    artefact.save(fx.symbolic_trace(model), folder / "dense.safetensors", example=torch.zeros(1, 3, 8, 8))
    artefact.save(fx.symbolic_trace(model), folder / "no_inputs.safetensors")
    return folder


def call(*args, status=0):
    """stdout of a command (stderr of a failing one), given its exit status."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    return result.stderr if status else result.stdout


def error(*args):
    """The one line of an error."""
    text = call(*args, status=1)
    assert text.startswith("structadmm: ") and "Traceback" not in text
    return text.splitlines()[0]


def test_version_and_help():
    assert call("--version") == f"structadmm {structadmm.__version__}\n"
    for command in ("run", "inspect", "compact", "bench"):
        assert command in call("--help")
        assert "--json" in call(command, "--help")
    assert call("bench", status=2) and call("nothing", status=2)


def test_compact_writes_what_inspect_shows(folder):
    out = folder / "small.safetensors"
    arguments = [f"{folder}/nets.py:make", "--weights", folder / "weights.pt", "--example", "2x3x8x8", "--out", out]
    told = json.loads(call("compact", *arguments, "--columns", "never", "--json"))
    assert told["file_bytes"] == out.stat().st_size and told["report"]["max_abs_diff"] < 1e-5

    seen = json.loads(call("inspect", out, "--json"))
    rows = {row["name"]: row for row in seen["layers"]}
    assert rows["a"]["shape"] == [7, 3, 3, 3] and rows["a"]["dense_shape"] == [8, 3, 3, 3]
    assert (rows["a"]["kept"], rows["a"]["of"], rows["a"]["structure"]) == (7, 8, "dense")
    assert rows["a"]["macs"] == 7 * 27 * 64 and rows["b"]["macs"] == 16 * 63 * 16
    assert rows["c"]["weights"] == 16 * 8 * 9 and rows["c"]["macs"] == 16 * 8 * 9 * 16
    total = seen["total"]
    assert total["weights"] == told["report"]["weights_after"] == sum(r["weights"] for r in seen["layers"])
    assert total["macs"] == told["report"]["macs_after"] and total["dense_macs"] == told["report"]["macs_before"]
    assert total["dense_weights"] == 8 * 27 + 16 * 72 + 16 * 72 + 160
    assert seen["inputs"] == [{"shape": [None, 3, 8, 8], "dtype": "float32"}]
    assert seen["metadata"]["report"] == told["report"]
    text = call("inspect", out)
    assert "7x3x3x3" in text and "8x3x3x3" in text and f"{total['weights']:,}" in text
    assert "wrote" in call("compact", *arguments, "--columns", "never")


def test_bench_measures_both(folder):
    out = folder / "small.safetensors"
    quick = ["--batch", 1, "--batch", 3, "--repeats", 2, "--min-time", 0, "--threads", 1, "--budget", 0]
    if not out.exists():
        test_compact_writes_what_inspect_shows(folder)
    before = torch.get_num_threads()
    result = json.loads(call("bench", out, *quick, "--json"))
    assert torch.get_num_threads() == before and result["threads"] == 1
    assert [row["batch"] for row in result["batches"]] == [1, 3]
    for row in result["batches"]:
        assert row["dense"]["median"] == min(t["median"] for n, t in row["all"].items() if n.startswith("dense"))
        assert 0 < row["speed_up"]["q1"] <= row["speed_up"]["median"] <= row["speed_up"]["q3"]
        assert row["optimized"]["form"] and row["speed_up_optimized"]["median"] > 0
        assert len(row["all"]) == 5
    # A file without its original asks for one.
    assert "--dense" in error("bench", folder / "dense.safetensors", *quick)
    assert "x" in call("bench", folder / "dense.safetensors", "--dense", f"{folder}/nets.py:make", *quick)


def test_errors_are_one_line(folder, tmp_path):
    nets, out = f"{folder}/nets.py", tmp_path / "out.safetensors"
    base = ["--example", "1x3x8x8", "--out", out]
    assert "PyTorch checkpoint" in error("inspect", folder / "weights.pt")
    assert "got none" in error("inspect", folder / "nowhere")
    assert "inputs got none" in error("inspect", folder / "no_inputs.safetensors")
    assert "wanted a function" in error("compact", f"{nets}:nothing", *base)
    assert "it has" in error("compact", f"{nets}:nothing", *base) and "make" in error(
        "compact", f"{nets}:nothing", *base
    )
    assert "wanted a torch.nn.Module" in error("compact", f"{nets}:wrong", *base)
    assert "RuntimeError: no luck today" in error("compact", f"{nets}:fails", *base)
    assert "can be imported" in error("compact", "no.such.module:make", *base)
    assert "can be imported" in error("compact", f"{folder}/other.py:make", *base)
    assert "wanted sizes like" in error("compact", f"{nets}:make", "--example", "1x3xa", "--out", out)
    text = error("compact", f"{nets}:make", *base, "--weights", folder / "nets.py")
    assert text.endswith(
        "nets.py: got a file that is no pickle of tensors alone, wanted a state_dict or a safetensors file"
    )
    text = error("compact", f"{nets}:make", "--example", "1x3x8x8", "--out", tmp_path / "none" / "x")
    assert "--out: got" in text and "a folder that exists" in text
    assert "got no file" in error("compact", f"{nets}:make", *base, "--weights", folder / "none.pt")
    torch.save({"a.weight": torch.zeros(8, 3, 3, 3), "z": torch.zeros(1)}, folder / "other.pt")
    text = error("compact", f"{nets}:make", *base, "--weights", folder / "other.pt")
    assert "no a.bias" in text and "and 4 more" in text
    assert not list(tmp_path.iterdir())
    assert call("bench", folder / "dense.safetensors", "--batch", 0, status=2)
    assert call("bench", folder / "dense.safetensors", "--threads", 10**6, status=2)
    dense = ["bench", folder / "dense.safetensors", "--dense", f"{nets}:other"]
    assert "other got RuntimeError" in error(*dense) and error(*dense).endswith(
        "wanted a network that takes [1, 3, 8, 8]"
    )
    assert "bench: " in error(*dense, "--batch", 10**8) and "wanted at most 2^30" in error(*dense, "--batch", 10**8)


def test_a_bfloat16_network(folder, tmp_path):
    out = tmp_path / "half.safetensors"
    call("compact", f"{folder}/nets.py:half", "--example", "1x3x8x8", "--out", out)
    assert json.loads(call("inspect", out, "--json"))["inputs"] == [{"shape": [None, 3, 8, 8], "dtype": "bfloat16"}]


def test_wrong_shapes_are_told(folder, tmp_path):
    state = torch.load(folder / "weights.pt", weights_only=True)
    state["a.weight"] = torch.zeros(8, 3, 5, 5)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    arguments = ["--weights", tmp_path / "w.pt", "--example", "1x3x8x8", "--out", tmp_path / "o.safetensors"]
    text = error("compact", f"{folder}/nets.py:make", *arguments)
    assert "a.weight [8, 3, 5, 5] in place of [8, 3, 3, 3]" in text and not (tmp_path / "o.safetensors").exists()


def test_columns_reach_the_kernel(folder, tmp_path):
    """compact writes compacted layers, inspect tells them, bench runs them."""
    state = torch.load(folder / "weights.pt", weights_only=True)
    state["c.weight"].flatten(1)[:, 5:] = 0
    torch.save(state, tmp_path / "w.pt")
    out = tmp_path / "o.safetensors"
    arguments = ["--weights", tmp_path / "w.pt", "--example", "1x3x8x8", "--out", out, "--columns", "always", "--json"]
    call("compact", f"{folder}/nets.py:make", *arguments)
    row = next(row for row in json.loads(call("inspect", out, "--json"))["layers"] if row["name"] == "c")
    assert (row["kind"], row["structure"], row["kept"], row["of"]) == ("CompactConv2d", "column", 10, 144)
    assert row["weights"] == 16 * 5 and row["macs"] == 16 * 5 * 16
    assert "CompactConv2d" in call("inspect", out)
    assert "x" in call("bench", out, "--batch", 2, "--repeats", 2, "--min-time", 0, "--budget", 0)


def test_interrupted_commands_exit_with_130(monkeypatch, folder):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(artefact, "load", interrupted)
    assert call("inspect", folder / "dense.safetensors", status=130) == "structadmm: interrupted\n"

    def told(*args, **options):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise structadmm.Error("go on with --resume") from None

    monkeypatch.setattr(artefact, "load", told)
    assert call("inspect", folder / "dense.safetensors", status=130) == "structadmm: go on with --resume\n"


def test_debug_shows_the_traceback(folder):
    result = CliRunner().invoke(
        app, ["--debug", "compact", f"{folder}/nets.py:fails", "--example", "1x3x8x8", "--out", "o"]
    )
    assert isinstance(result.exception, RuntimeError)


def test_the_program(folder):
    """As installed: modules of the current folder are found, stdout is JSON alone."""
    code = "import sys; sys.path.pop(0); from structadmm.cli import main; main()"
    arguments = ["compact", "nets:make", "--example=1x3x8x8", "--out=p.safetensors", "--columns=never", "--json"]
    env = {**os.environ, "PYTHONPATH": str(Path(structadmm.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["file"] == "p.safetensors" and (folder / "p.safetensors").exists()


def test_layer_table_tells_structures():
    """Columns and blocks, counted by hand."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 20, 1, bias=False), nn.Flatten(), nn.Linear(80, 3))
    dense[0].weight.data[:3].flatten(1)[:, :13] = 0  # 5 of 18 columns left in the first conv group, 17 in the second
    dense[0].weight.data[3:].flatten(1)[:, 4] = 0
    for part, n in zip(dense[1].weight.data.split(8), (1, 6, 2), strict=True):
        part[:, n:] = 0
    dense[3].weight.data[:, :60] = 0
    compacted = nn.Sequential(
        CompactConv2d.from_dense(dense[0], block=3),
        CompactConv2d.from_dense(dense[1], block=8),
        nn.Flatten(),
        CompactLinear.from_dense(dense[3], block=3),
    )
    rows = layers.layer_table(compacted, torch.zeros(2, 4, 4, 4), dense)
    assert [(r.structure, r.blocks, r.kept, r.of) for r in rows] == [
        ("column", None, 5 + 17, 36),
        ("block_column", 3, 1 + 6 + 2, 18),
        ("column", None, 20, 80),
    ]
    weights = [3 * 22, 8 * 1 + 8 * 6 + 4 * 2, 60]
    assert [r.weights for r in rows] == weights and [r.macs for r in rows] == [weights[0] * 4, weights[1] * 4, 60]
    assert [r.dense_weights for r in rows] == [108, 120, 240]


def test_layer_table_counts_calls_and_keeps_the_mode():
    layer = nn.Linear(4, 4, bias=False)
    network = nn.Sequential(layer, nn.ReLU(), layer, nn.Conv1d(5, 6, 2, groups=1)).train()
    network[1].eval()
    rows = layers.layer_table(network, torch.zeros(3, 5, 4))
    assert [m.training for m in network] == [True, False, True, True] and [r.name for r in rows] == ["0", "3"]
    assert rows[0].macs == 2 * 5 * 16 and rows[1].macs == 6 * 5 * 2 * 3 and rows[1].dense_weights == 60
