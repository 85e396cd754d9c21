"""Tiny torchrun jobs of two ranks on this machine, and what they leave behind."""

import dataclasses
import functools
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from gpsd_dist.distributed import exit_codes
from tests.helpers import forked
from tests.helpers.commands import TINY_GIN, environment
from tests.integration.tiny_data import differing, read_checkpoint, step_folder, train_losses, write_tiny_data

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, SAVE_INTERVAL = 18, 4  # 3 epochs of 6 steps; saved after steps 4, 6, 8, 12, 16, 18
TIMEOUT_S = 900  # of one job; alone on two cores it takes 10 to 30, beside much other work ten times as long
OPTIONS = TINY_GIN + "EPOCHS = 3\nModelConfig.dropout = 0.1\nTrainConfig.keep_last = 3\n"


@dataclasses.dataclass(frozen=True)
class Ended:
    """A job that is over."""

    status: int
    stderr: str

    def says(self, *words: str) -> None:
        """Fails with the whole output if one is missing."""
        missing = [word for word in words if word not in self.stderr]
        assert not missing, f"{missing} are not in:\n{self.stderr}"


class Workshop:
    """Data and the uninterrupted run that all others are compared with."""

    launcher = "gpsd_dist.launcher"

    def __init__(self, root: pathlib.Path):
        # Under nohup, or as a background job of a shell, these are ignored, and jobs would inherit that.
        for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
            if signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, handler)
        self.root = root
        self.data_dir = root / "data"
        write_tiny_data(self.data_dir)
        (root / "options.gin").write_text(OPTIONS)

    @functools.cached_property
    def reference(self) -> "Run":
        run = Run(self, "reference")
        ended = forked.run("gpsd_dist.train", *run.options(), ranks=2, timeout_s=TIMEOUT_S)
        assert ended.returncode == 0, ended.stderr
        return run


class Run:
    """One output folder, and the jobs that are started on it one after the other."""

    def __init__(self, workshop: Workshop, name: str, output: pathlib.Path | None = None):
        self.workshop, self.folder = workshop, workshop.root / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.output, self.data_dir = output or self.folder / "run", workshop.data_dir
        (self.folder / "trace").mkdir()

    def own_data(self, **changes) -> pathlib.Path:
        """A copy of the data for this run alone, or with `changes` another data set."""
        self.data_dir = self.folder / "data"
        if changes:
            write_tiny_data(self.data_dir, **changes)
        else:
            shutil.copytree(self.workshop.data_dir, self.data_dir)
        return self.data_dir

    def fault(self, what: str, place: str, step: int, rank: int = 1, **more) -> dict:
        """For `start`; happens once in the life of this run."""
        once = str(self.folder / f"{what}_happened")
        return {"what": what, "place": place, "step": step, "rank": rank, "once": once} | more

    def options(self) -> list[str]:
        """Arguments of gpsd_dist.train."""
        options = ["--gin_file", "configs/stage/pretrain.gin", "--gin_file", str(self.workshop.root / "options.gin")]
        options += [f"--gin.DATA_DIR={self.data_dir}", f"--gin.OUTPUT_DIR={self.output}"]
        return [*options, f"--gin.TrainConfig.save_interval_steps={SAVE_INTERVAL}"]

    def start(self, fault: dict | None = None, *overrides: str, restarts: int = 0, env=None) -> subprocess.Popen:
        launcher = [sys.executable, "-m", self.workshop.launcher, "--nproc-per-node", "2", "--monitor-interval", "0.1"]
        launcher += ["--max-restarts", str(restarts), "--standalone"]
        command = [*launcher, "-m", "tests.faults.entry", *self.options(), *overrides]
        variables = environment_of_a_job() | {"TRACE": str(self.folder / "trace")} | (env or {})
        if fault:
            variables["FAULT"] = json.dumps(fault)
        return subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)

    def train(self, fault: dict | None = None, *overrides: str, restarts: int = 0, env=None) -> Ended:
        return finish(self.start(fault, *overrides, restarts=restarts, env=env))

    def stop_at(self, step: int) -> None:
        """Trains, saves after `step`, and leaves."""
        ended = self.train(self.fault("signal_launcher", "batch", step, signal="SIGTERM"))
        assert ended.status == exit_codes.STOPPED, ended.stderr

    def goes_on(self, *words: str) -> None:
        """The same command again, to the end, with `words` in its log."""
        ended = self.train()
        assert ended.status == exit_codes.FINISHED, ended.stderr
        ended.says(*words)

    def done(self, at_most: int) -> int:
        """Steps that were repeated; fails if these are more than `at_most`, or a bit differs from the reference."""
        self.check_equals_reference()
        lost = self.steps_lost()
        assert lost <= at_most, f"{lost} steps were repeated, at most {at_most} are promised"
        return lost

    def check_equals_reference(self) -> None:
        """Same bits in every tensor of the last checkpoint, one history of the loss, nothing half-written left."""
        reference = self.workshop.reference
        self.check_equals(reference)

    def check_equals(self, other: "Run") -> None:
        mine, theirs = (read_checkpoint(step_folder(run.output, STEPS)) for run in (self, other))
        assert not differing(mine, theirs), differing(mine, theirs)
        assert train_losses(self.output) == train_losses(other.output)
        assert not list((self.output / "checkpoints").glob(".*"))

    def steps_lost(self) -> int:
        """How often rank 0 began a step that it had begun before."""
        lines = (self.folder / "trace" / "rank0").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        assert set(steps) == set(range(1, STEPS + 1))
        return len(steps) - len(set(steps))


def finish(process: subprocess.Popen, timeout_s: float = TIMEOUT_S) -> Ended:
    """Waits; a job that takes longer is killed with its ranks and fails the test."""
    try:
        _, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            _, stderr = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            _, stderr = process.communicate()
        raise AssertionError(f"the job still ran after {timeout_s} s:\n{stderr}") from None
    return Ended(process.returncode, stderr)


def environment_of_a_job() -> dict[str, str]:
    """Without a group or a fault that this process may be in; stopped ranks get 5 s."""
    return environment("FAULT", "TRACE", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5")


def wait_until(condition, what: str, timeout_s: float = TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s} s"
        time.sleep(0.05)
