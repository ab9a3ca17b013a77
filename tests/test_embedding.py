"""The engine in a C++ program: examples/cpp, found by find_package, built, run without Python."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import structadmm as sa
from networks import ResNet, randomise

ROOT = Path(__file__).resolve().parent.parent
PREFIX = Path(sa.__file__).resolve().parent


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    """The example, built against the installed package."""
    if shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no cmake or no C++ compiler on this machine")
    if not (ROOT / "examples/cpp").is_dir():
        pytest.skip("no examples beside the tests")
    build = tmp_path_factory.mktemp("build")
    configure = ["cmake", "-S", ROOT / "examples/cpp", "-B", build, f"-DCMAKE_PREFIX_PATH={PREFIX}"]
    for command in (configure, ["cmake", "--build", build]):
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "classify"


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    model = randomise(ResNet("B"), 0.4, 1).eval()
    sa.save(model, path, example=torch.zeros(1, 3, 12, 10))
    return model, path


def run(classify, *arguments):
    # No trace of Python in the environment: the program stands on its own library.
    return subprocess.run(
        [str(a) for a in (classify, *arguments)], capture_output=True, text=True, env={"PATH": os.defpath}
    )


def test_an_image_is_classified_as_torch_does(classify, network, tmp_path):
    model, path = network
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    (tmp_path / "image.ppm").write_bytes(b"P6\n# a comment\n10 12\n255\n" + pixels.tobytes())
    done = run(classify, path, tmp_path / "image.ppm", 0.5, 0.25)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        want = model((torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25)[0]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [int(r[0]) for r in rows] == want.topk(5).indices.tolist()
    assert np.allclose([float(r[1]) for r in rows], want.topk(5).values, rtol=1e-3, atol=1e-5)


def test_errors_are_told_and_nothing_aborts(classify, network, tmp_path):
    _, path = network
    image = tmp_path / "image.pgm"
    image.write_bytes(b"P5 10 12 255\n" + bytes(120))
    done = run(classify, path, image)
    assert done.returncode == 1 and "x got [N, 1, 12, 10], wanted 3 channels" in done.stderr
    done = run(classify, tmp_path / "missing", image)
    assert done.returncode == 1 and "file got none, wanted an artefact" in done.stderr
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(path.read_bytes()[:-4])
    done = run(classify, bad, image)
    assert done.returncode == 1 and "SHA-256 got" in done.stderr
