"""The main job: test accuracy, conv weights, multiply-adds, file size and latency of the dense and the pruned network.

    python bench/main_job.py --seeds 0,1,2 --json bench/results/main_job.json

Runs a recipe (default: digits) once per seed, in runs/, and keeps what the tables need.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from structadmm.files import atomic_write_text
from structadmm.pipeline import load_recipe, run_recipe
from structadmm.progress import Bars, result_table

# The history of a run is in its own result.json.
LEFT_OUT = ("history", "iterations", "compact", "plan", "settings", "stages")


def main() -> None:
    parser = argparse.ArgumentParser(description="The main job, seed by seed.")
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--data", type=Path, help="folder of the data's original files")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--split", type=int, help="seed of the data split, in place of the recipe's")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    seeds = [int(s) for s in args.seeds.split(",")]
    recipe = load_recipe(args.recipe)
    if args.split is not None:
        recipe = replace(recipe, data=replace(recipe.data, split=args.split))
    out = None if args.split is None else f"runs/{recipe.name}-split{args.split}"
    result = run_recipe(recipe, seeds, out, folder=args.data, restart=True, watcher=Bars())
    Console().print(result_table(result))
    if args.json:
        runs = [{k: v for k, v in run.items() if k not in LEFT_OUT} for run in result["runs"]]
        atomic_write_text(args.json, json.dumps({"summary": result["summary"], "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
