"""Data sets: splits, resumable batches, and the original file formats, whole and damaged."""

import gzip
import importlib.util
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from structadmm import data
from structadmm.data import Batches, DataError


def _idx(values: np.ndarray) -> bytes:
    return struct.pack(f">{values.ndim + 1}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()


def _mnist_files(folder: Path, n: int = 40, packed: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for kind in ("train", "t10k"):
        made[f"{kind}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        made[f"{kind}-labels-idx1-ubyte"] = (np.arange(n) % 10).astype(np.uint8)
    for name, values in made.items():
        raw = _idx(values)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)
    return made


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    a, b = data.load("digits", seed=0), data.load("digits", seed=1)
    for which in ("train", "val", "test"):
        assert torch.equal(getattr(a, which).x, getattr(b, which).x), "the split must not depend on the seed"
    n = [getattr(a, which).n_images for which in ("train", "val", "test")]
    assert sum(n) == 1797
    assert n[2] / 1797 == pytest.approx(0.4, abs=0.005)
    assert n[1] / (n[0] + n[1]) == pytest.approx(0.2, abs=0.005)
    for which in ("train", "val", "test"):
        share = torch.bincount(getattr(a, which).y, minlength=10) / getattr(a, which).n_images
        # Classes have 174 to 183 of 1797 images; rounding moves a class by at most one image of the 216.
        assert (share - 0.1).abs().max() < 0.01
    rest, held = data._stratified(torch.arange(1797) % 10, 0.4, data.SPLIT_SEED)
    assert torch.equal(torch.cat([rest, held]).sort().values, torch.arange(1797))


def test_normalisation_is_that_of_the_training_images() -> None:
    train = data.load("digits", batch=862).train
    (x, _), *_ = train
    # No augmentation: a pass over all of them is the training split itself, in another order.
    assert abs(float(x.mean())) < 1e-5 and abs(float(x.std()) - 1) < 1e-5


def test_batches_go_on_from_a_state() -> None:
    def make(seed: int) -> Batches:
        return data.load("digits", batch=64, shift=1, rotate=10.0, zoom=0.1, seed=seed).train

    a, b = make(3), make(4)
    list(a)  # one pass
    b.load_state_dict(a.state_dict())
    for (xa, ya), (xb, yb) in zip(a, b, strict=True):
        assert torch.equal(xa, xb) and torch.equal(ya, yb)
    assert not torch.equal(next(iter(make(3)))[0], next(iter(make(4)))[0])


def test_a_shuffled_pass_holds_each_image_at_most_once() -> None:
    x = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
    batches = Batches(x, torch.arange(50), 16, torch.zeros(1), torch.ones(1), shuffle=True)
    seen = torch.cat([y for _, y in batches])
    assert len(batches) == 3 and len(seen) == 48 == len(seen.unique())
    plain = Batches(x, torch.arange(50), 16, torch.zeros(1), torch.ones(1))
    assert torch.equal(torch.cat([y for _, y in plain]), torch.arange(50))


def test_shift_moves_the_image_and_brings_in_zeros() -> None:
    x = torch.zeros(64, 1, 5, 5, dtype=torch.uint8)
    x[:, :, 2, 2] = 200
    batches = Batches(x, torch.zeros(64).long(), 64, torch.zeros(1), torch.ones(1), shuffle=True, shift=2, seed=1)
    ((moved, _),) = batches
    places = {tuple(p) for p in (moved[:, 0] == 200).nonzero()[:, 1:].tolist()}
    assert (moved.sum((1, 2, 3)) == 200).all() and len(places) > 12, "25 places are equally likely for 64 images"


def test_flip_mirrors_about_half() -> None:
    x = torch.zeros(200, 1, 1, 3, dtype=torch.uint8)
    x[..., 0] = 9
    ((y, _),) = Batches(x, torch.zeros(200).long(), 200, torch.zeros(1), torch.ones(1), shuffle=True, flip=True)
    mirrored = int((y[..., 2] == 9).sum())
    assert mirrored + int((y[..., 0] == 9).sum()) == 200
    assert 60 < mirrored < 140  # 100 expected, standard deviation 7


def test_a_small_warp_changes_the_image_a_little() -> None:
    # A smooth image, so that bilinear resampling by a hundredth of a degree is the identity up to a grey level or so.
    line = torch.linspace(0, 250, 16)
    x = ((line[:, None] + line) / 2).round().to(torch.uint8).expand(8, 1, 16, 16).clone()

    def inner(**how: float) -> torch.Tensor:
        ((y, _),) = Batches(x, torch.zeros(8).long(), 8, torch.zeros(1), torch.ones(1), shuffle=True, **how)  # type: ignore[arg-type]
        return (y - x.float())[..., 2:-2, 2:-2].abs().max()

    assert inner(rotate=0.01) < 1
    assert inner(rotate=30.0, zoom=0.2) > 10


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_are_read_exactly(tmp_path: Path, packed: bool, name: str) -> None:
    made = _mnist_files(tmp_path, packed=packed)
    found = data.load(name, tmp_path, batch=8, val=0.25)
    assert torch.equal(found.test.x[:, 0], torch.from_numpy(made["t10k-images-idx3-ubyte"]))
    assert (found.train.n_images, found.val.n_images, found.test.n_images) == (30, 10, 40)  # type: ignore[attr-defined]


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    made = _mnist_files(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    damage = {
        "wanted .* for sizes": whole[:-1],
        "magic 0x00000801": _idx(made["train-labels-idx1-ubyte"]) + bytes(20),
        "IDX header": whole[:10],
    }
    for message, raw in damage.items():
        path.write_bytes(raw)
        with pytest.raises(DataError, match=f"train-images-idx3-ubyte has .*{message}"):
            data.load("mnist", tmp_path)
    path.write_bytes(_idx(made["train-images-idx3-ubyte"][:-1]))
    with pytest.raises(DataError, match="39 train images and 40 labels"):
        data.load("mnist", tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="has no train-images-idx3-ubyte or"):
        data.load("mnist", tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        data.load("mnist", tmp_path)


def test_mnist_itself(data_dir: Path) -> None:
    found = data.load("mnist", data_dir / "mnist", val=0.1)
    n = found.val.n_images  # type: ignore[attr-defined]
    assert found.train.n_images + n == 60000 and found.test.n_images == 10000  # type: ignore[attr-defined]
    assert abs(n - 6000) <= 5, "a tenth of each class, each rounded"
    assert found.test.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]  # type: ignore[attr-defined]


def _cifar_arrays(n: int = 10) -> tuple[np.ndarray, list[int]]:
    return np.random.default_rng(1).integers(0, 256, (n, 3072), dtype=np.uint8), [i % 10 for i in range(n)]


def _write_cifar(folder: Path, form: str) -> tuple[np.ndarray, list[int]]:
    x, y = _cifar_arrays()
    root = folder / f"cifar-10-batches-{form}"
    root.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        if form == "py":
            # Protocol 4 names what NumPy's own pickles name; the official files' protocol 2 is tested on those files.
            (root / name).write_bytes(pickle.dumps({b"data": x, b"labels": y}, protocol=4))
        else:
            (root / f"{name}.bin").write_bytes(np.hstack([np.array(y, np.uint8)[:, None], x]).tobytes())
    return x, y


@pytest.mark.parametrize("form", ["py", "bin"])
def test_cifar_both_forms(tmp_path: Path, form: str) -> None:
    x, y = _write_cifar(tmp_path, form)
    for folder in (tmp_path, tmp_path / f"cifar-10-batches-{form}"):
        found = data.load("cifar10", folder, batch=8, val=0.2)
        assert torch.equal(found.test.x.flatten(1), torch.from_numpy(x)) and found.test.y.tolist() == y  # type: ignore[attr-defined]
        assert (found.train.n_images, found.val.n_images) == (40, 10)  # type: ignore[attr-defined]


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    _write_cifar(tmp_path, "py")
    target = tmp_path / "ran"
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps({b"data": _Evil(target)}))
    with pytest.raises(DataError, match="data_batch_3 is no CIFAR-10 python batch: it asks for"):
        data.load("cifar10", tmp_path)
    assert not target.exists()


def test_damaged_cifar_files_are_named(tmp_path: Path) -> None:
    x, y = _write_cifar(tmp_path, "py")
    root = tmp_path / "cifar-10-batches-py"
    whole = (root / "data_batch_2").read_bytes()
    for raw in (whole[:100], b"", pickle.dumps({b"data": x[:, :100], b"labels": y}), pickle.dumps({b"labels": y})):
        (root / "data_batch_2").write_bytes(raw)
        with pytest.raises(DataError, match="data_batch_2"):
            data.load("cifar10", tmp_path)
    (root / "data_batch_2").write_bytes(pickle.dumps({b"data": x, b"labels": [10, *y[1:]]}, protocol=4))
    with pytest.raises(DataError, match="data_batch_2 has labels .* wanted one of 0..9"):
        data.load("cifar10", tmp_path)
    (root / "data_batch_2").unlink()
    with pytest.raises(DataError, match="has no data_batch_2"):
        data.load("cifar10", tmp_path)
    (tmp_path / "bin").mkdir()
    _write_cifar(tmp_path / "bin", "bin")
    with open(tmp_path / "bin/cifar-10-batches-bin/test_batch.bin", "ab") as f:
        f.write(b"x")
    with pytest.raises(DataError, match=r"test_batch.bin has 30731 bytes"):
        data.load("cifar10", tmp_path / "bin")


def test_an_official_cifar_pickle(data_dir: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("load_cifar10", data_dir / "cifar10/load_cifar10.py")
    assert spec and spec.loader
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    x, y = theirs.load_batch("test_batch")
    path = tmp_path / "test_batch"
    path.write_bytes(theirs.official_pickle("test_batch", x, y, theirs.filenames()[50000:]))
    mine, labels = data._cifar_py(path)
    assert torch.equal(mine, torch.from_numpy(x)) and torch.equal(labels, torch.from_numpy(y))


OWN = """
import torch
def tensors(n=20):
    make = lambda: (torch.randn(n, 3, 8, 8), torch.arange(n) % 4)
    return make(), make(), make()
def loaders():
    from torch.utils.data import DataLoader, TensorDataset
    return tuple(DataLoader(TensorDataset(*t), batch_size=8) for t in tensors())
def nothing():
    return None
value = 3
"""


def test_ones_own_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data_module.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = data.load("own_data_module:tensors", args={"n": 40}, batch=16)
    assert found.example.shape == (1, 3, 8, 8) and len(found.train) == 2
    assert len(data.load("own_data_module:loaders").train) == 3
    for name, message in (
        ("own_data_module:nothing", "returned NoneType"),
        ("own_data_module:value", "wanted a function"),
        ("own_data_module:absent", "cannot be imported"),
        ("no_such_module_at_all:f", "cannot be imported"),
    ):
        with pytest.raises(DataError, match=message):
            data.load(name)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.name: got 'imagenet', wanted one of digits"):
        data.load("imagenet")
    with pytest.raises(DataError, match="--data FOLDER"):
        data.load("mnist")
    with pytest.raises(DataError, match="wanted an existing folder"):
        data.load("mnist", tmp_path / "absent")
    with pytest.raises(DataError, match="neither cifar-10-batches-py"):
        data.load("cifar10", tmp_path)
    with pytest.raises(DataError, match="only a module:function takes arguments"):
        data.load("digits", args={"n": 1})
    with pytest.raises(DataError, match="data.val: got 1.5"):
        data.load("digits", val=1.5)
    with pytest.raises(DataError, match="size got 5000"):
        data.load("digits", batch=5000)


def test_another_split_holds_other_images() -> None:
    first, same, other = (data.load("digits", split=s).test for s in (1, 1, 2))
    assert torch.equal(first.x, same.x)
    assert len(first.x) == len(other.x) and not torch.equal(first.x, other.x)
