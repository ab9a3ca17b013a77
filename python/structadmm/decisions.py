"""What was measured on this machine, kept in one JSON file so that it is measured once.

The file is `decisions.json` in the folder STRUCTADMM_CACHE, or else in the user's cache folder. It is written whole or
not at all; one that cannot be read is ignored with a warning. Nothing in it is trusted beyond its being JSON: who reads
an entry checks it.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

from .files import atomic_write_text

VARIABLE = "STRUCTADMM_CACHE"
_VERSION = 1


def cpu_model() -> str:
    """The processor as the system tells it: name, family, model, stepping."""
    fields: dict[str, str] = {}
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                name, _, value = line.partition(":")
                fields.setdefault(name.strip(), value.strip())
        except OSError:
            pass
    known = [fields[k] for k in ("model name", "cpu family", "model", "stepping") if k in fields]
    return " ".join(known) or platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where decisions.json is."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "structadmm"


class Decisions:
    """Entries (JSON objects) of one machine by kind and key. `put` keeps in memory, `save` writes them all.

    machine: what a figure depends on besides its key (CPU, instruction set, threads, versions), as one string.
    """

    def __init__(self, machine: str, folder: Path | None = None) -> None:
        self.machine = machine
        self.file = (folder or cache_folder()) / "decisions.json"
        self._new: dict[str, dict[str, Any]] = {}
        self._known = self._read().get(machine, {})

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        for source in (self._new, self._known):
            entries = source.get(kind)
            entry = entries.get(key) if isinstance(entries, dict) else None
            if isinstance(entry, dict):
                return entry
        return None

    def put(self, kind: str, key: str, entry: dict[str, Any]) -> None:
        self._new.setdefault(kind, {})[key] = entry

    def save(self) -> None:
        """Write what is new beside what is there, a write of another process in the meantime included."""
        if not self._new:
            return
        machines = self._read(warn=False)
        mine = machines.setdefault(self.machine, {})
        for kind, entries in self._new.items():
            old = mine.get(kind)
            mine[kind] = {**(old if isinstance(old, dict) else {}), **entries}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.file, json.dumps({"version": _VERSION, "machines": machines}, indent=1) + "\n")
        except OSError as e:
            warnings.warn(f"optimize: {self.file} got {e.strerror or e}, wanted a file to write; nothing is kept",
                          stacklevel=3)  # fmt: skip
        self._known, self._new = mine, {}

    def _read(self, warn: bool = True) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("version") != _VERSION:
                raise ValueError("another version")
            machines = content["machines"]
            if not isinstance(machines, dict) or not all(isinstance(m, dict) for m in machines.values()):
                raise ValueError("no table of machines")
            return machines
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, RecursionError) as e:
            if warn:
                warnings.warn(f"optimize: {self.file} got {e}, wanted decisions; it is ignored", stacklevel=4)
            return {}
