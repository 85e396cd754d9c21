"""Tiny torchrun jobs of two ranks on this machine, and what they leave behind."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

from tests.integration.tiny_data import differing, read_checkpoint, step_folder, train_losses, write_tiny_data

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, SAVE_INTERVAL = 18, 4  # 3 epochs of 6 steps; saved after steps 4, 6, 8, 12, 16, 18
TIMEOUT_S = 240  # of one job; alone on two cores it takes 10 to 30
OPTIONS = """
LAYERS = 1
WIDTH = 16
HEADS = 2
EMBEDDING_DIM = 16
GLOBAL_BATCH_ROWS = 8
MAX_HISTORY_LENGTH = 10
EPOCHS = 3
ModelConfig.dropout = 0.1
TablesConfig.small_table_max_rows = 20
DataConfig.num_data_shards = 2
DataConfig.eval_batch_rows_per_rank = 4
PretrainConfig.num_negative_groups = 2
PretrainConfig.num_negatives = 16
TrainConfig.log_interval_steps = 1
TrainConfig.keep_last = 3
"""


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

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.data_dir = root / "data"
        write_tiny_data(self.data_dir)
        (root / "options.gin").write_text(OPTIONS)

    @functools.cached_property
    def reference(self) -> "Run":
        run = Run(self, "reference")
        ended = run.train()
        assert ended.status == 0, ended.stderr
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

    def start(self, fault: dict | None = None, *overrides: str, restarts: int = 0, env=None) -> subprocess.Popen:
        launcher = [sys.executable, "-m", "gpsd_dist.launcher", "--nproc-per-node", "2", "--monitor-interval", "0.1"]
        launcher += ["--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        options = ["--gin_file", "configs/stage/pretrain.gin", "--gin_file", str(self.workshop.root / "options.gin")]
        options += [f"--gin.DATA_DIR={self.data_dir}", f"--gin.OUTPUT_DIR={self.output}"]
        options += [f"--gin.TrainConfig.save_interval_steps={SAVE_INTERVAL}"]
        command = [*launcher, "-m", "tests.faults.entry", *options, *overrides]
        environment = environment_of_a_job() | {"TRACE": str(self.folder / "trace")} | (env or {})
        if fault:
            environment["FAULT"] = json.dumps(fault)
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def train(self, fault: dict | None = None, *overrides: str, restarts: int = 0, env=None) -> Ended:
        return finish(self.start(fault, *overrides, restarts=restarts, env=env))

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
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "FAULT", "TRACE")
    ours = {name: value for name, value in os.environ.items() if name not in dropped}
    return ours | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}


def wait_until(condition, what: str, timeout_s: float = TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s} s"
        time.sleep(0.05)
