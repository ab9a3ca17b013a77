"""A small training run that is killed at random moments and goes on from its last checkpoint; run by test_resume.py.

    python resume_training.py FOLDER SEED

First trains without a break in FOLDER/whole, then in FOLDER/killed in a child process that gets SIGKILL after a random
time, again and again until one lives to the end. Prints the number of kills, and in how many different states of
progress they left the run. Children are forked, so that torch is imported once and a kill costs next to nothing.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from structadmm.admm import ADMM
from structadmm.files import atomic_torch_save
from structadmm.plan import Plan, Rule, Spec
from structadmm.schedules import ResidualBalancing

EPOCHS, STEPS = 8, 6
HARDEN_AT = 6  # epochs of ADMM, the rest masked retraining


def train(folder, steps=EPOCHS * STEPS):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    plan = Plan((Rule("2", (Spec("filter", 0.25), Spec("column", 0.6))), Rule("5", (Spec("block_column", 0.8, 4),))))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    admm = ADMM(model, plan, rho=ResidualBalancing(1e-2, mu=1.2))
    masks, step = None, 0
    path = folder / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        admm.load_state_dict(state["admm"])
        torch.set_rng_state(state["rng"])
        step = state["step"]
        if state["masks"] is not None:
            masks = admm.harden_()
            masks.load_state_dict(state["masks"])
            masks.hold(optimizer)
    while step < steps:
        x = torch.randn(8, 1, 8, 8)
        y = (x.mean((1, 2, 3)) * 20).long().clamp(-2, 1) + 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if masks is None:
            admm.add_penalty_grad_()
        optimizer.step()
        step += 1
        if step % STEPS == 0 and masks is None:
            admm.step()
            if step == HARDEN_AT * STEPS:
                masks = admm.harden_()
                masks.hold(optimizer)
        state = {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "admm": admm.state_dict(),
            "masks": None if masks is None else masks.state_dict(),
            "rng": torch.get_rng_state(),
        }
        atomic_torch_save(state, path)


def in_child(folder):
    pid = os.fork()
    if pid == 0:
        try:
            train(folder)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return pid


def main(folder, seed):
    for name in ("warm", "whole", "killed"):
        (folder / name).mkdir()
    train(folder / "warm", 2)  # torch imports parts of itself at first use, for seconds: once, here
    start = time.monotonic()
    if os.waitstatus_to_exitcode(os.waitpid(in_child(folder / "whole"), 0)[1]):
        return 1
    took = time.monotonic() - start
    moments, kills, seen = random.Random(seed), 0, set()
    while True:
        pid = in_child(folder / "killed")
        time.sleep(moments.uniform(0.02, 0.2) * took)  # at least three kills on a machine twice as fast by now
        os.kill(pid, signal.SIGKILL)  # not reaped yet, so the process id is still ours
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != -signal.SIGKILL:
            print(f"kills {kills} states {len(seen)}")
            return code
        kills += 1
        path = folder / "killed" / "checkpoint.pt"
        if path.exists():
            seen.add(torch.load(path, weights_only=True)["step"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
