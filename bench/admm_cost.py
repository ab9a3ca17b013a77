"""What does ADMM cost per optimizer step, as a share of a ResNet-18/CIFAR training step at batch 128?

The cost is the penalty gradient of every step, and one ADMM iteration (project, dual update, residuals) shared by the
optimizer steps of an epoch of 50,000 images. Column pruning of every convolution but the first. Also told: the cost of
holding the zeros in masked retraining, and the torch loop that the fused penalty gradient replaces.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from structadmm.admm import ADMM
from structadmm.models import build
from structadmm.plan import Plan
from timing import arguments, finish, interleave, machine, sync_of

IMAGES = 50_000


def measure(device: str, batch: int, repeats: int, structure: str) -> dict[str, Any]:
    """One row: training step, penalty gradient, ADMM iteration and hold, in turns."""
    torch.manual_seed(0)
    model = build("resnet18").to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    admm = ADMM(model, Plan.uniform(model, structure, 0.9), rho=1e-3)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)

    def train() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    train()
    masks = ADMM(model, admm.plan).harden_()
    held = torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], 0.0, momentum=0.9)

    def eager_penalty() -> None:
        for name in masks:
            w = model.get_submodule(name).weight
            assert isinstance(w, torch.Tensor) and w.grad is not None
            w.grad.add_(w.detach() - admm.z(name) + admm.u(name), alpha=admm.rho(name))

    masks.hold(held)
    before, after = (
        list(hooks.values())[0] for hooks in (held._optimizer_step_pre_hooks, held._optimizer_step_post_hooks)
    )

    def hold() -> None:
        before()
        after()

    calls = {
        "train": train,
        "penalty": admm.add_penalty_grad_,
        "penalty_eager": eager_penalty,
        "admm_step": admm.step,
        "hold": hold,
    }
    times = interleave(calls, warmup=0.1, repeats=repeats, sync=sync_of(device))
    steps = math.ceil(IMAGES / batch)
    penalty, iteration, held_share = (times.ratio(n, "train").median for n in ("penalty", "admm_step", "hold"))
    share = penalty + iteration / steps
    row = {
        "structure": structure,
        **machine(device, dtype="f32"),
        "batch": batch,
        "weights": sum(la.weights for la in admm.plan),
        "optimizer_steps_per_iteration": steps,
        "seconds": times.to_dict(),
        "share_of_training_step": share,
        "share_of_penalty": penalty,
        "share_of_iteration_amortised": iteration / steps,
        "share_of_hold_in_retraining": held_share,
        "penalty_speedup_over_eager": times.ratio("penalty_eager", "penalty").to_dict(),
    }
    print(
        f"{row['threads']} threads  training step {times['train'].median * 1e3:8.1f} ms  "
        f"penalty {times['penalty'].median * 1e3:6.2f} ms  iteration {times['admm_step'].median * 1e3:6.1f} ms  "
        f"ADMM {share:.2%} of the step  (hold in retraining: {held_share:.2%})",
        flush=True,
    )
    return row


def main() -> None:
    parser = arguments(__doc__ or "", repeats=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--structure", default="column")
    args = parser.parse_args()
    rows = []
    for threads in args.threads if args.device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        rows.append(measure(args.device, args.batch, args.repeats, args.structure))
    finish({"question": (__doc__ or "").splitlines()[0], "rows": rows}, args.json)


if __name__ == "__main__":
    main()
