"""Image sets for the recipes: digits (shipped by scikit-learn), and MNIST, Fashion-MNIST and CIFAR-10 in their original
files.

Everything is held in memory as uint8 and handed out as normalised float32 batches [N, C, H, W] by `Batches`, whose
shuffling and augmentation draw from one generator with a state_dict, so an interrupted run continues with the very same
batches.
"""

from __future__ import annotations

import gzip
import importlib
import io
import math
import pickle
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import Error

SPLIT_SEED = 20220811
"""Seed of the splits: fixed unless a recipe says otherwise, so runs with different seeds see the same images."""


class DataError(Error, ValueError):
    """A data folder, file or loader is not what was wanted."""


class Batches:
    """Batches of an in-memory image set.

    x: uint8 [N, C, H, W]; y: int64 [N]; mean, std: per channel, in the units of x. Yields (float32 [n, C, H, W], int64
    [n]). With shuffle the order is new in every pass and an incomplete last batch is left out (BatchNorm needs more
    than a stray image). shift: largest random translation in whole pixels, zeros coming in; flip: mirror half of the
    images. rotate, zoom: a random turn of up to so many degrees and a magnification of 1 -+ zoom, bilinear (the shift
    is then of fractions of a pixel too).
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        size: int,
        mean: Tensor,
        std: Tensor,
        *,
        shuffle: bool = False,
        shift: int = 0,
        flip: bool = False,
        rotate: float = 0.0,
        zoom: float = 0.0,
        seed: int = 0,
    ) -> None:
        if x.dtype != torch.uint8 or x.dim() != 4 or y.shape != x.shape[:1]:
            raise DataError(
                f"Batches: x got {x.dtype} {tuple(x.shape)} with {len(y)} labels, wanted uint8 [N, C, H, W], N labels"
            )
        if size < 1 or (shuffle and size > len(x)):
            raise DataError(f"Batches: size got {size}, wanted 1..{len(x)}")
        self.x, self.y, self.size = x, y, size
        self.mean, self.std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        self.shuffle, self.shift, self.flip, self.rotate, self.zoom = shuffle, shift, flip, rotate, zoom
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.x) // self.size if self.shuffle else -(-len(self.x) // self.size)

    @property
    def n_images(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.x)
        order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
        for i in range(len(self)):
            index = order[i * self.size : (i + 1) * self.size]
            yield (self._augment(self.x[index]).float() - self.mean) / self.std, self.y[index]

    def _augment(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        if self.rotate or self.zoom:
            x = self._warp(x.float())
        elif self.shift:
            s = self.shift
            padded = torch.nn.functional.pad(x, (s, s, s, s))
            top, left = torch.randint(0, 2 * s + 1, (2, n, 1), generator=self.generator)
            rows, cols = top + torch.arange(h), left + torch.arange(w)
            x = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
        if self.flip:
            mirrored = torch.rand(n, generator=self.generator) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return x

    def _warp(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        turn, grow, dx, dy = torch.rand(4, n, generator=self.generator) * 2 - 1
        angle, factor = turn * math.radians(self.rotate), 1 + grow * self.zoom
        cos, sin = torch.cos(angle) / factor, torch.sin(angle) / factor
        rows = [cos, -sin, dx * (2 * self.shift / w), sin, cos, dy * (2 * self.shift / h)]
        grid = torch.nn.functional.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(x.shape), align_corners=False)
        return torch.nn.functional.grid_sample(x, grid, align_corners=False)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])


@dataclass
class Dataset:
    """What a recipe trains, chooses and is judged on: three iterables of (x, y) batches, of which `train` also has a
    length.
    """

    name: str
    train: Any
    val: Iterable[tuple[Tensor, Tensor]]
    test: Iterable[tuple[Tensor, Tensor]]
    description: str = ""

    @property
    def example(self) -> Tensor:
        """One image, [1, C, H, W], taken from the validation split."""
        return next(iter(self.val))[0][:1]


def load(
    name: str,
    folder: str | Path | None = None,
    *,
    batch: int = 64,
    val: float = 0.2,
    shift: int = 0,
    flip: bool = False,
    rotate: float = 0.0,
    zoom: float = 0.0,
    split: int = SPLIT_SEED,
    seed: int = 0,
    args: Mapping[str, Any] | None = None,
) -> Dataset:
    """Load a set by name: "digits", "mnist", "fashion-mnist", "cifar10", or "module:function" for one's own.

    folder: where the original files lie (not for digits). val: share of the training images held back for choosing.
    split: seed of the validation split, and of the test split of digits; the other sets bring their test images.
    args: passed to one's own function, which returns a Dataset, or (train, val, test), each a pair of tensors (x uint8
    or float [N, C, H, W], y int64 [N]) or an iterable of batches. Raises DataError naming the file and what was wanted.
    """
    if ":" in name:
        return _own(name, dict(args or {}), batch, seed)
    if args:
        raise DataError(
            f"data.args: got {sorted(args)} for the set {name!r}, wanted none: only a module:function takes arguments"
        )
    if name != "digits" and name not in _FROM_FOLDER:
        raise DataError(
            f"data.name: got {name!r}, wanted one of {', '.join(['digits', *_FROM_FOLDER])} or module:function"
        )
    if not 0 < val < 1:
        raise DataError(f"data.val: got {val}, wanted a share between 0 and 1")
    if name != "digits":
        if folder is None:
            raise DataError(f"data.folder: {name} is read from its original files: give their folder (--data FOLDER)")
        if not Path(folder).is_dir():
            raise DataError(f"data.folder: got {str(folder)!r}, wanted an existing folder")
    x, y, x_test, y_test = _digits(split) if name == "digits" else _FROM_FOLDER[name](Path(folder or ""))
    rest, held = _stratified(y, val, split)
    mean = x[rest].float().mean((0, 2, 3))
    std = x[rest].float().std((0, 2, 3)) if x.shape[1] > 1 else x[rest].float().std().view(1)
    augmentation: dict[str, Any] = {"shift": shift, "flip": flip, "rotate": rotate, "zoom": zoom}
    train = Batches(x[rest], y[rest], batch, mean, std, shuffle=True, seed=seed, **augmentation)
    size = "x".join(map(str, x.shape[1:]))
    described = f"{name}: {len(rest)} training, {len(held)} validation, {len(y_test)} test images {size}"
    return Dataset(
        name, train, Batches(x[held], y[held], 512, mean, std), Batches(x_test, y_test, 512, mean, std), described
    )


def _stratified(y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (rest, held): `share` of every class is held, both in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    held = []
    for c in y.unique():
        members = (y == c).nonzero().flatten()
        n = max(1, round(share * len(members)))
        held.append(members[torch.randperm(len(members), generator=generator)[:n]])
    index = torch.cat(held).sort().values
    rest = torch.ones(len(y), dtype=torch.bool)
    rest[index] = False
    return rest.nonzero().flatten(), index


def _digits(split: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1797 grey images 8x8, values 0..16 (UCI optical digits, test part); 40 % of each class is the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise DataError("data.name: digits needs scikit-learn (pip install scikit-learn)") from e
    bunch = load_digits()
    x = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)
    y = torch.from_numpy(bunch.target.astype(np.int64))
    rest, test = _stratified(y, 0.4, split)
    return x[rest], y[rest], x[test], y[test]


def _read(folder: Path, stem: str) -> tuple[Path, bytes]:
    """The bytes of folder/stem, or of folder/stem.gz unpacked."""
    for path in (folder / stem, folder / (stem + ".gz")):
        if path.is_file():
            try:
                raw = path.read_bytes()
                return path, gzip.decompress(raw) if path.suffix == ".gz" else raw
            except (OSError, EOFError, zlib.error) as e:
                raise DataError(f"data: {path} cannot be read: {e}") from e
    raise DataError(f"data: {folder} has no {stem} or {stem}.gz")


def read_idx(folder: Path, stem: str, dims: int) -> Tensor:
    """An IDX file of unsigned bytes with `dims` dimensions (the MNIST format: magic 0x0000_08_dd, big-endian sizes,
    data).
    """
    path, raw = _read(folder, stem)
    head = 4 + 4 * dims
    if len(raw) < head:
        raise DataError(f"data: {path} has {len(raw)} bytes, wanted an IDX header of {head}")
    magic, *sizes = struct.unpack(f">{dims + 1}I", raw[:head])
    if magic != 0x0800 + dims:
        raise DataError(
            f"data: {path} has magic 0x{magic:08x}, wanted 0x{0x0800 + dims:08x} (unsigned bytes, {dims} dimensions)"
        )
    wanted = head
    n = 1
    for s in sizes:
        n *= s
    wanted += n
    if len(raw) != wanted:
        raise DataError(f"data: {path} has {len(raw)} bytes, wanted {wanted} for sizes {sizes}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=head).reshape(sizes).copy())


def _mnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts: list[Tensor] = []
    for kind in ("train", "t10k"):
        x, y = read_idx(folder, f"{kind}-images-idx3-ubyte", 3), read_idx(folder, f"{kind}-labels-idx1-ubyte", 1)
        if len(x) != len(y) or not len(x):
            raise DataError(
                f"data: {folder} has {len(x)} {kind} images and {len(y)} labels, wanted as many and at least one"
            )
        if int(y.max()) > 9:
            raise DataError(f"data: {folder} has {kind} label {int(y.max())}, wanted 0..9")
        parts += [x.unsqueeze(1), y.long()]
    return parts[0], parts[1], parts[2], parts[3]


class _CifarUnpickler(pickle.Unpickler):
    """Admits only the three names that a pickled NumPy array needs; anything else is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            from numpy._core.multiarray import _reconstruct

            return _reconstruct
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs")


def _cifar_py(path: Path) -> tuple[Tensor, Tensor]:
    try:
        batch = _CifarUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        data, labels = batch[b"data"], np.asarray(batch[b"labels"])
    except Exception as e:  # a damaged pickle raises nearly anything
        raise DataError(f"data: {path} is no CIFAR-10 python batch: {e or type(e).__name__}") from e
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise DataError(
            f"data: {path} has data {getattr(data, 'dtype', type(data))} {getattr(data, 'shape', '')}, wanted uint8 "
            f"[N, 3072]"
        )
    return _checked_cifar(path, data.reshape(-1, 3, 32, 32), labels)


def _cifar_bin(path: Path) -> tuple[Tensor, Tensor]:
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(raw) or len(raw) % 3073:
        raise DataError(f"data: {path} has {len(raw)} bytes, wanted a multiple of 3073 (one label, 3072 pixels)")
    rows = raw.reshape(-1, 3073)
    return _checked_cifar(path, rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0])


def _checked_cifar(path: Path, x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    if y.shape != (len(x),) or y.dtype.kind not in "iu" or len(y) == 0 or not 0 <= y.min() <= y.max() <= 9:
        raise DataError(f"data: {path} has labels {y.dtype} {y.shape} for {len(x)} images, wanted one of 0..9 for each")
    return torch.from_numpy(x.copy()), torch.from_numpy(y.astype(np.int64))


def _cifar10(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forms: tuple[tuple[str, str, Callable[[Path], tuple[Tensor, Tensor]]], ...] = (
        ("cifar-10-batches-py", "", _cifar_py),
        ("cifar-10-batches-bin", ".bin", _cifar_bin),
    )
    for sub, suffix, read in forms:
        for root in (folder / sub, folder):
            if (root / f"test_batch{suffix}").is_file():
                names = [f"data_batch_{i}{suffix}" for i in range(1, 6)]
                absent = [n for n in names if not (root / n).is_file()]
                if absent:
                    raise DataError(f"data: {root} has no {', '.join(absent)}")
                train = [read(root / n) for n in names]
                x, y = torch.cat([t[0] for t in train]), torch.cat([t[1] for t in train])
                return x, y, *read(root / f"test_batch{suffix}")
    raise DataError(
        f"data: {folder} has neither cifar-10-batches-py/test_batch nor cifar-10-batches-bin/test_batch.bin"
    )


_FROM_FOLDER: dict[str, Callable[[Path], tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "mnist": _mnist,
    "fashion-mnist": _mnist,
    "cifar10": _cifar10,
}


def import_function(key: str, name: str) -> Callable[..., Any]:
    """The object behind "module:function"; `key` names the recipe's entry in errors. Raises DataError."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise DataError(f"{key}: got {name!r}, which cannot be imported: {e}") from e
    if not callable(found):
        raise DataError(f"{key}: got {name!r}, a {type(found).__name__}, wanted a function")
    return found


def _own(name: str, args: dict[str, Any], batch: int, seed: int) -> Dataset:
    made = import_function("data.name", name)(**args)
    if isinstance(made, Dataset):
        return made
    if not isinstance(made, tuple) or len(made) != 3:
        raise DataError(f"data.name: {name} returned {type(made).__name__}, wanted a Dataset or (train, val, test)")
    parts: list[Any] = []
    for which, part in zip(("train", "val", "test"), made, strict=True):
        if isinstance(part, tuple) and len(part) == 2 and all(isinstance(t, Tensor) for t in part):
            part = _Pairs(part[0], part[1], batch, shuffle=which == "train", seed=seed)
        elif not hasattr(part, "__iter__") or (which == "train" and not hasattr(part, "__len__")):
            raise DataError(
                f"data.name: {name} returned for {which} a {type(part).__name__}, wanted (x, y) tensors or an "
                f"iterable of batches"
            )
        parts.append(part)
    return Dataset(name, parts[0], parts[1], parts[2], description=name)


class _Pairs(Batches):
    """Batches of the user's own tensors, handed out as they are."""

    def __init__(self, x: Tensor, y: Tensor, size: int, *, shuffle: bool, seed: int) -> None:
        if len(x) != len(y) or not len(x):
            raise DataError(f"Batches: x got {tuple(x.shape)} with {len(y)} labels, wanted as many and at least one")
        self.x, self.y, self.size, self.shuffle = x, y, min(size, len(x)), shuffle
        self.shift, self.flip = 0, False
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.x)
        order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
        for i in range(len(self)):
            index = order[i * self.size : (i + 1) * self.size]
            yield self.x[index], self.y[index]
