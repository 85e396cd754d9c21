"""`gpsd_dist.train` with one fault put in at an exact place. For torchrun: `-m tests.faults.entry ARGUMENTS`.

The product knows nothing of this. TRACE: a folder in which every rank writes down the rows that it trains on. FAULT
(JSON, may be absent): what (`ACTIONS`, or nan), rank, step, place (batch, loss, backward, save_tensors, save_commit),
once: a file that is made when it happens, so that a restarted job is spared; slow_s: pause before every later step;
wait_for: a file that must be there first; further keys are the action's. Further places: start, load (of a checkpoint),
validation. HEAP: a folder in which every rank says at each validation what it has allocated; may be absent.
"""

import ctypes
import gc
import json
import os
import pathlib
import resource
import signal
import sys
import threading
import time

import pyarrow as pa
import torch

from gpsd_dist import train, trainer
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


def kill_all_ranks(fault: dict) -> None:
    """At once, as the end of a machine does; the launcher lives."""
    launcher = os.getppid()
    for pid in pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if int(pid) != os.getpid():
            os.kill(int(pid), signal.SIGKILL)
    kill_self(fault)


def fail_opens(fault: dict) -> None:
    """From now on the next `times` openings of files whose path holds `part` fail with `number`."""
    left = [fault["times"]]

    def hook(event: str, details: tuple) -> None:
        if event == "open" and left[0] and fault["part"] in str(details[0]):
            left[0] -= 1
            raise OSError(fault["number"], os.strerror(fault["number"]))

    sys.addaudithook(hook)


def _each_sync(part: str, act) -> None:
    fsync = os.fsync

    def watched(descriptor):
        if part in os.readlink(f"/proc/self/fd/{descriptor}"):
            act()
        fsync(descriptor)

    os.fsync = watched


def slow_sync(fault: dict) -> None:
    _each_sync(fault["part"], lambda: time.sleep(fault["seconds"]))


def fail_sync(fault: dict) -> None:
    def fail():
        raise OSError(fault["number"], os.strerror(fault["number"]))

    _each_sync(fault["part"], fail)


def run_out_of_descriptors(fault: dict) -> None:
    """For `seconds`: nothing more can be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    threading.Timer(fault["seconds"], resource.setrlimit, (resource.RLIMIT_NOFILE, before)).start()


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
        kill_all_ranks,
        fail_opens,
        slow_sync,
        fail_sync,
        run_out_of_descriptors,
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

    fill_tensors, evaluate_split = trainer.fill_tensors, trainer.evaluate_split

    def faulty_fill(*args, **kwargs):
        fault.maybe("load")
        return fill_tensors(*args, **kwargs)

    def faulty_evaluate(*args, **kwargs):
        fault.maybe("validation")
        note_heap(fault.step)
        return evaluate_split(*args, **kwargs)

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
    trainer.fill_tensors, trainer.evaluate_split = faulty_fill, faulty_evaluate
    fault.maybe("start")


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33: bytes of all arenas."""

    _NAMES = ("arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks", "used", "free", "top")
    _fields_ = [(name, ctypes.c_size_t) for name in _NAMES]


def note_heap(step: int) -> None:
    """Adds a line of what malloc and Arrow have given out, and how many blocks Python has, to the file of this rank.

    Called at one place of the loop, since a step takes and gives back more than a leak of hours, and so does garbage
    that Python has not collected yet. Not while a checkpoint is written, as is often the case on a busy machine.
    """
    if "HEAP" not in os.environ or any(thread.name == "checkpoint" for thread in threading.enumerate()):
        return
    if not gc.get_freeze_count():
        gc.freeze()  # what is there from the start need not be looked through each time
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    fields = {"used_mb": (found.used + found.mapped) / 2**20, "held_mb": (found.arena + found.mapped) / 2**20}
    fields |= {"arrow_mb": pa.total_allocated_bytes() / 2**20, "blocks": sys.getallocatedblocks()}
    with open(pathlib.Path(os.environ["HEAP"], f"rank{os.environ['RANK']}"), "a") as file:
        file.write(json.dumps({"step": step} | fields) + "\n")


if __name__ == "__main__":
    install(Fault(json.loads(os.environ.get("FAULT", "{}"))), pathlib.Path(os.environ["TRACE"]))
    sys.exit(train.main(sys.argv[1:]))
