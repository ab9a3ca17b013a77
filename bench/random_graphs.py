"""Does compaction hold on random networks made of every operation? Thousands of those of which the tests run a few.

    PYTHONPATH=python python bench/random_graphs.py [--seeds 0:3000] [--again] [--failed] [--seconds N]

Each seed makes a network and zeros (tests/random_graphs.py); the compacted network must give the masked one's outputs
within 1e-10 in float64, keep no filter without weights for no reason, and have nothing that a second compaction takes
without having named it. Seeds that fail are printed with their error; `STRUCTADMM_SEEDS=17:18 pytest
tests/test_random_graphs.py` runs one alone.

Results are added to results/random_graphs.json; seeds that have one are skipped, so a run goes on where it stopped.
--failed does those again that failed, --again all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from structadmm.files import atomic_write_text

RESULTS = Path(__file__).parent / "results" / "random_graphs.json"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def ranges(numbers: list[int]) -> list[list[int]]:
    """Sorted numbers as half-open ranges."""
    out: list[list[int]] = []
    for n in numbers:
        if out and out[-1][1] == n:
            out[-1][1] = n + 1
        else:
            out.append([n, n + 1])
    return out


def main() -> None:
    from random_graphs import check

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:3000", help="FIRST:LAST, the last excluded")
    parser.add_argument("--again", action="store_true", help="forget the results there are")
    parser.add_argument("--failed", action="store_true", help="do those again that failed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    options = parser.parse_args()
    first, last = map(int, options.seeds.split(":"))
    torch.set_num_threads(1)
    known: dict[str, Any] = {}
    if RESULTS.exists() and not options.again:
        known = json.loads(RESULTS.read_text())
    passed = {n for a, b in known.get("passed", []) for n in range(a, b)}
    failed: dict[str, str] = {} if options.failed else known.get("failed", {})
    totals = [known.get("parameters", 0), known.get("parameters_after", 0)]

    def write() -> None:
        row = {"passed": ranges(sorted(passed)), "failed": failed}
        row |= {"parameters": totals[0], "parameters_after": totals[1], "torch": torch.__version__}
        atomic_write_text(RESULTS, json.dumps(row, indent=1) + "\n")

    started = saved = time.monotonic()
    for seed in range(first, last):
        if seed in passed or str(seed) in failed:
            continue
        if time.monotonic() - started > options.seconds:
            print("time is up")
            break
        try:
            totals = [t + n for t, n in zip(totals, check(seed), strict=True)]
            passed.add(seed)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            failed[str(seed)] = f"{type(error).__name__} at {at.name}:{at.lineno}: {str(error)[:300]}"
            print(f"seed {seed}: {failed[str(seed)]}", flush=True)
        if time.monotonic() - saved > 10:
            write()
            saved = time.monotonic()
            print(f"{len(passed) + len(failed)} done, {len(failed)} failed", flush=True)
    write()
    print(f"{len(passed)} of {len(passed) + len(failed)} passed; parameters {totals[0]:,} -> {totals[1]:,}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
