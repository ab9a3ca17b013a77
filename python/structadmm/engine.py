"""Engine: runs an artefact over NumPy arrays, without torch and without the class that the network came from."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .errors import ArtefactError

Array = NDArray[Any]


class Engine:
    """A network of an artefact (`structadmm.save`, `structadmm compact`), ready to run: BatchNorm folded, activations
    and additions fused, weights packed for this CPU at the first run of a shape.

        engine = structadmm.Engine("net.safetensors")
        scores = engine.run(images)  # float32 [batch, channels, height, width] -> float32 [batch, classes]

    artefact: a path, or the file's bytes.
    dtype: what it computes in, "float32" or "bfloat16" (with float32 sums); arrays keep their own dtype.
    isa: an instruction set of `_core.supported_isas()`; None takes the one in use.

    Any batch size, and any size of images that the network's layers allow. Threads: STRUCTADMM_NUM_THREADS, or
    `_core.set_num_threads`; the result does not depend on their number. `run` may be called from several threads.
    Raises ArtefactError: a file that is no artefact or is damaged, or a network that the runtime cannot hold, with the
    node and the reason.
    """

    def __init__(
        self, artefact: str | os.PathLike[str] | bytes | memoryview, dtype: str = "float32", isa: str | None = None
    ) -> None:
        try:
            if isinstance(artefact, (bytes, bytearray, memoryview)):
                self._core = _core.Engine.from_bytes(artefact, dtype, isa or "")
            else:
                self._core = _core.Engine.open(os.fspath(artefact), dtype, isa or "")
        except ValueError as e:
            raise ArtefactError(str(e)) from None
        self.dtype: str = self._core.dtype
        self.name: str = self._core.name
        #: (shape, dtype) of each input with None for the batch, where the file says so.
        self.inputs: list[tuple[tuple[int | None, ...], str]] | None = self._core.inputs
        #: What `save` was given as metadata.
        self.metadata: dict[str, Any] = json.loads(self._core.metadata)

    def run(self, *inputs: Array) -> Any:
        """The network's output, or a tuple of them, for float arrays of any strides; of the dtype of the first input.

        Raises ValueError: a number, shape or dtype of arrays that the network does not take.
        """
        outputs = self._core.run([np.asarray(x) for x in inputs])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    __call__ = run

    def output_shapes(self, *shapes: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes of the outputs for inputs of these shapes."""
        return [tuple(s) for s in self._core.output_sizes([list(s) for s in shapes])]

    def describe(self, *shapes: tuple[int, ...]) -> list[dict[str, Any]]:
        """The steps that inputs of these shapes run: node, kernel, images at a time, bytes of their output."""
        steps = self._core.describe([list(s) for s in shapes])
        return [dict(zip(("node", "kernel", "images", "bytes"), s, strict=True)) for s in steps]

    def profile(self, *inputs: Array, repeats: int = 10) -> list[dict[str, Any]]:
        """`describe` with the seconds that each step took at best."""
        inputs = tuple(np.asarray(x) for x in inputs)
        seconds = self._core.profile(list(inputs), repeats)
        return [s | {"seconds": t} for s, t in zip(self.describe(*(x.shape for x in inputs)), seconds, strict=True)]

    def __repr__(self) -> str:
        return f"Engine({self.name}, {self.dtype}, inputs={self.inputs})"
