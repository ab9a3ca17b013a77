"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk. Not every system lets a folder be opened (Windows) or synced.
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` only when the block ends without an exception.

    Writes to a temporary file in the same folder, then fsync and os.replace, so a reader (or a kill at any moment) sees
    the old file or the new one, never a part. On an exception the temporary file is removed and `path` is as it was; a
    SIGKILL can leave a `.NAME.*.tmp` behind.
    """
    target = Path(path)
    # Here, because the errors of mkstemp and os.replace name a file that nobody knows.
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "got a folder, wanted the name of a file", str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "got no folder to write in, wanted one that exists", str(target.parent))
    fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(fd, "wb") as f:
            # mkstemp makes the file private; an ordinary file has 0666 less the umask, a replaced one keeps its mode.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~umask)
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(name, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(target.parent)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    with atomic_write(path) as f:
        f.write(text.encode())


def atomic_torch_save(obj: Any, path: str | os.PathLike[str]) -> None:
    """torch.save, whole or not at all."""
    import torch

    with atomic_write(path) as f:
        torch.save(obj, f)
