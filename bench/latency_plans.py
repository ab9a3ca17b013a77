"""Are latency plans right? The speed-up that plan_for predicts against the one that is measured.

    python bench/latency_plans.py --json bench/results/latency_plans.json

Rows that the file has are not measured again.

Each network is pruned once as planned (the groups of largest norm stay, weights as networks.py makes them), compacted,
and compared with the dense network in a run of its own; both run as structadmm.optimize has them and take turns. One
thread, batch 1, f32.
"""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn

import networks
import structadmm as sa
from structadmm import decisions
from timing import arguments, keep, kept, machine


@dataclass(frozen=True)
class Case:
    network: str
    structure: str
    target: float
    size: int | None = None  # of images, where it is not the network's own: optimize measures every large layer

    @property
    def name(self) -> str:
        return f"{self.network}, {self.structure}" + (f" @{self.size}" if self.size else "")


CASES = [
    Case("resnet18/cifar", "block_column", 2.0),
    Case("alexnet convs", "column", 2.0),
    Case("mobilenet_v2", "filter", 1.5),
    Case("resnet50", "column", 2.0, 96),
    Case("vgg16 convs", "filter", 2.0, 64),
    Case("resnet18/cifar", "block_column", 3.0),
    Case("alexnet convs", "column", 3.0),
    Case("mobilenet_v2", "filter", 2.0),
    Case("resnet50", "column", 3.0, 96),
    Case("vgg16 convs", "filter", 3.0, 64),
    Case("resnet50", "column", 2.0),
]


def pruned(net: nn.Module, plan: sa.Plan, x: torch.Tensor) -> nn.Module:
    """A compacted copy, projected once as planned."""
    net = copy.deepcopy(net)
    filters = any(c.structure == "filter" for r in plan.rules for c in r.constraints)
    sa.ADMM(net, plan, coupled=sa.coupled_layers(net, x) if filters else ()).harden_()
    return sa.compact(net.eval(), x, verify=False)


def measure(case: Case, threads: int, budget: float) -> dict[str, Any]:
    net, shape = networks.network(case.network)
    x = torch.randn(1, shape[0], *((case.size,) * 2 if case.size else shape[1:]))
    began = perf_counter()
    plan = sa.plan_for(net, x, case.structure, speedup=case.target, budget=budget, threads=threads)
    assert isinstance(plan, sa.LatencyPlan) and plan.prediction is not None
    planned = perf_counter() - began
    small = pruned(net, plan, x)
    found = sa.measure_speedup(plan, net, small, x, budget=budget / 3, report=False)
    said, m = plan.prediction, found.measured
    line = f"{case.name:28} {case.target:g}x: predicted {said.speedup:.2f}, measured {m.median:.2f} "
    line += f"[{m.q1:.2f}, {m.q3:.2f}] ({found.error:+.1%}), {' / '.join(found.choices)}, trials "
    line += ", ".join(f"{t.predicted:.2f} / {t.found:.2f}" for t in said.trials)
    print(f"{line}, {perf_counter() - began:.0f} s", flush=True)
    return {
        "case": case.name, "target": case.target, "batch": 1, **machine(dtype="f32"), "threads": threads,
        "predicted": said.speedup, "measured": m.to_dict(), "error": found.error,
        "trials": [[t.predicted, t.found] for t in said.trials],
        "seconds": {"dense": found.dense.to_dict(), "small": found.small.to_dict()},
        "runs_as": list(found.choices), "torch_form": said.table.torch, "planning": planned,
        "total": perf_counter() - began, "rates": {r.name: r.rate for r in said.layers if r.rate},
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "", threads=[1])
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds to measure a latency table for")
    args = parser.parse_args()
    rows = kept(args.json)
    known = {(r["case"], r["target"]) for r in rows}
    with tempfile.TemporaryDirectory() as folder:  # nothing from earlier runs
        torch.set_num_threads(args.threads[0])
        os.environ[decisions.VARIABLE] = folder
        for case in CASES:
            wanted = any(part in case.name for part in args.only)
            if wanted and (case.name, case.target) not in known:
                rows.append(measure(case, args.threads[0], args.budget))
                keep((__doc__ or "").splitlines()[0], rows, args.json)


if __name__ == "__main__":
    main()
