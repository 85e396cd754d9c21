"""`gpsd_dist.train` with one fault put in at an exact place. For torchrun: `-m tests.faults.entry ARGUMENTS`.

The product knows nothing of this. TRACE: a folder in which every rank writes down the rows that it trains on. FAULT
(JSON, may be absent): what (`ACTIONS`, or nan), rank, step, place (batch, loss, backward, save_tensors, save_commit),
once: a file that is made when it happens, so that a restarted job is spared; slow_s: pause before every later step;
wait_for: a file that must be there first; further keys are the action's.
"""

import ctypes
import json
import os
import pathlib
import signal
import sys
import time

import torch

from gpsd_dist import train
from gpsd_dist.data.loader import Loader
from gpsd_dist.training_step import TrainingStep


def kill_self(fault: dict) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def signal_launcher(fault: dict) -> None:
    os.kill(os.getppid(), getattr(signal, fault["signal"]))


def sleep(fault: dict) -> None:
    time.sleep(fault["seconds"])


def hold_interpreter_lock(fault: dict) -> None:
    ctypes.PyDLL(None).sleep(int(fault["seconds"]))


def freeze(fault: dict) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fill_disk(fault: dict) -> None:
    """Leaves `bytes_left` of the file system of `folder`."""
    space = os.statvfs(fault["folder"])
    with open(f"{fault['folder']}/filler", "wb") as file:
        file.write(b"\1" * (space.f_bavail * space.f_frsize - fault["bytes_left"]))


def move_away(fault: dict) -> None:
    os.rename(fault["path"], f"{fault['path']}.gone")


def set_clock_back(fault: dict) -> None:
    """By a week, for what asks Python (libfaketime 0.9.10 breaks `time.sleep` of Python 3.11)."""
    now_s = time.time
    time.time = lambda: now_s() - 7 * 86_400


ACTIONS = {
    action.__name__: action
    for action in (
        kill_self,
        signal_launcher,
        sleep,
        hold_interpreter_lock,
        freeze,
        fill_disk,
        move_away,
        set_clock_back,
    )
}


class Fault:
    """Happens once, at its place and step (of a save: that step or the next save after it), on its rank."""

    def __init__(self, description: dict):
        self.description, self.step = description, 0

    def at(self, place: str) -> bool:
        """Whether it is to happen now; from then on it never is."""
        wanted = self.description
        if wanted.get("place") != place or wanted["rank"] != int(os.environ["RANK"]):
            return False
        if self.step < wanted["step"] or (place in ("batch", "loss", "backward") and self.step > wanted["step"]):
            return False
        try:
            os.close(os.open(wanted["once"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        print(f"fault: {wanted['what']} at {place} of step {self.step}", file=sys.stderr, flush=True)
        return True

    def maybe(self, place: str) -> None:
        if self.at(place):
            while "wait_for" in self.description and not os.path.exists(self.description["wait_for"]):
                time.sleep(0.02)
            ACTIONS[self.description["what"]](self.description)


def install(fault: Fault, trace: pathlib.Path) -> None:
    """Wraps the places."""
    batches, backward, save, rename = Loader.__iter__, torch.Tensor.backward, torch.save, pathlib.Path.rename
    check = TrainingStep._check_finite
    trace_file = open(trace / f"rank{os.environ['RANK']}", "a", buffering=1)  # noqa: SIM115  until the process ends

    def traced(self):
        for parts in batches(self):
            if self._shuffle:  # training
                fault.step = self.epoch * self.steps_per_epoch + self.step
                rows = [user for part in parts for user in part.user_hash_B.tolist()]
                trace_file.write(json.dumps({"step": fault.step, "rows": rows}) + "\n")
                fault.maybe("batch")
                if fault.step > fault.description.get("step", 0):
                    time.sleep(fault.description.get("slow_s", 0))
            yield parts

    def faulty_backward(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        fault.maybe("backward")

    def faulty_check(self, done):
        if fault.at("loss"):
            done.loss_sums_L = done.loss_sums_L * float("nan")
        check(self, done)

    def faulty_save(*args, **kwargs):
        save(*args, **kwargs)
        fault.maybe("save_tensors")

    def faulty_rename(self, target):
        if self.name.endswith(".partial"):
            fault.maybe("save_commit")
        return rename(self, target)

    Loader.__iter__, torch.Tensor.backward, torch.save = traced, faulty_backward, faulty_save
    TrainingStep._check_finite = faulty_check
    pathlib.Path.rename = faulty_rename


if __name__ == "__main__":
    install(Fault(json.loads(os.environ.get("FAULT", "{}"))), pathlib.Path(os.environ["TRACE"]))
    sys.exit(train.main(sys.argv[1:]))
