"""The faults, one function each: it breaks a real job, lets it go on, and returns the steps that had to be repeated.

Every one ends with the run equal, bit for bit, to the run that was never disturbed.
"""

import functools
import itertools
import json
import pathlib
import socket
import typing

from gpsd_dist.distributed import exit_codes
from gpsd_dist.metrics.profiling import BACKWARD
from tests.faults import checkpoint_cases, data_cases, file_cases, reading_cases, serving_cases
from tests.faults.jobs import SAVE_INTERVAL, Run, Workshop, finish, wait_until

Case = typing.Callable[[Workshop], int]
_HANG = reading_cases.HANG  # a step takes about 0.05 s; four times as long in the first step


def _recovers(
    workshop: Workshop, name: str, at_most: int, what: str, place: str, step: int, *words, options=(), **more
):
    """torchrun starts the ranks again, and the job ends well by itself."""
    run = Run(workshop, name)
    ended = run.train(run.fault(what, place, step, **more), *options, restarts=1)
    assert ended.status == exit_codes.FINISHED, ended.stderr
    ended.says(f"fault: {what}", "weights: resumed from", *words)
    return run.done(at_most)


def kill_worker_mid_step(workshop: Workshop) -> int:
    """Dense gradients are there, the tables are not updated yet. The newest checkpoint may still be in the making."""
    return _recovers(workshop, "kill_mid_step", 2 * SAVE_INTERVAL, "kill_self", "backward", 7, "failed (exitcode: ")


def kill_main_worker_mid_step(workshop: Workshop) -> int:
    """Rank 0: it holds the output folder, and writes metrics and markers."""
    return _recovers(workshop, "kill_main", 2 * SAVE_INTERVAL, "kill_self", "backward", 11, rank=0)


def kill_worker_mid_checkpoint(workshop: Workshop) -> int:
    """Some tensors of the step are written."""
    return _recovers(workshop, "kill_mid_save", 2 * SAVE_INTERVAL, "kill_self", "save_tensors", 8)


def kill_worker_before_the_commit(workshop: Workshop) -> int:
    """Everything is written, nothing says so yet."""
    return _recovers(workshop, "kill_commit", 2 * SAVE_INTERVAL, "kill_self", "save_commit", 12, rank=0)


def kill_agent(workshop: Workshop) -> int:
    """Without torchrun the ranks save and leave by themselves, and are not in the way of the next start."""
    run = Run(workshop, "kill_agent")
    ended = run.train(run.fault("signal_launcher", "batch", 7, signal="SIGKILL", slow_s=0.5))  # waits for the ranks
    assert ended.status == -9
    ended.says("asked to stop: saved step")
    run.goes_on("weights: resumed from")
    return run.done(0)


def _stopped(workshop: Workshop, name: str, signal_name: str, status: int) -> int:
    run = Run(workshop, name)
    ended = run.train(run.fault("signal_launcher", "batch", 7, signal=signal_name), restarts=1)
    assert ended.status == status, ended.stderr
    ended.says("asked to stop: saved step")
    assert ended.stderr.splitlines()[-1].startswith("launcher: ")
    run.goes_on("weights: resumed from")
    return run.done(0)


def kill_all_workers(workshop: Workshop) -> int:
    """Both at once, in a backward pass."""
    return _recovers(workshop, "kill_all", 2 * SAVE_INTERVAL, "kill_all_ranks", "backward", 10)


def kill_worker_in_a_validation(workshop: Workshop) -> int:
    return _recovers(workshop, "kill_validation", 2 * SAVE_INTERVAL, "kill_self", "validation", 12)


def kill_worker_while_it_loads(workshop: Workshop) -> int:
    """The run was stopped; its next life dies before it has weights."""
    run = Run(workshop, "kill_loading")
    run.stop_at(9)
    ended = run.train(run.fault("kill_self", "load", 0), restarts=1)
    assert ended.status == exit_codes.FINISHED, ended.stderr
    ended.says("fault: kill_self at load", "weights: resumed from")
    return run.done(0)


def sighup(workshop: Workshop) -> int:
    """The terminal is gone: as SIGTERM."""
    return _stopped(workshop, "sighup", "SIGHUP", exit_codes.STOPPED)


def sigterm(workshop: Workshop) -> int:
    """Preemption: a status that a scheduler starts again, and no step is lost."""
    return _stopped(workshop, "sigterm", "SIGTERM", exit_codes.STOPPED)


def sigint(workshop: Workshop) -> int:
    """Ctrl-C: saved as well, but a person wanted it."""
    return _stopped(workshop, "sigint", "SIGINT", exit_codes.INTERRUPTED)


def hung_worker(workshop: Workshop) -> int:
    """The watchdog of each rank says where it stands; torchrun starts all again."""
    words = ("watchdog: rank 1", f"Step 7, in '{BACKWARD}'", f"last collective begun: {BACKWARD} of step 7",
             "watchdog: rank 0", "in faulty_backward", "status 124")  # fmt: skip
    return _recovers(workshop, "hung", SAVE_INTERVAL, "sleep", "backward", 7, *words, options=_HANG, seconds=100)


def hung_worker_that_holds_the_interpreter(workshop: Workshop) -> int:
    """No Python thread of the rank runs any more, its watchdog neither: those of the others do."""
    words = ("watchdog: rank 0", "Step 7, in")
    options, more = _HANG, {"seconds": 100}
    return _recovers(
        workshop, "held", SAVE_INTERVAL, "hold_interpreter_lock", "batch", 7, *words, options=options, **more
    )


def frozen_worker(workshop: Workshop) -> int:
    """SIGSTOP, or a machine that stands still: only the others can tell."""
    return _recovers(workshop, "frozen", SAVE_INTERVAL, "freeze", "batch", 9, "watchdog: rank 0", options=_HANG)


def nan_in_one_rank(workshop: Workshop) -> int:
    """A broken device: before a weight moves, with rank and step; gone after the restart."""
    words = ("error: rank 1, step 8: the loss is not finite", "last good checkpoint: ")
    return _recovers(workshop, "nan", SAVE_INTERVAL + 2, "nan", "loss", 9, *words)


def clock_jumps_back(workshop: Workshop) -> int:
    """By a week, in the middle of the run: no timeout, no rate and no file depends on the time of day."""
    run = Run(workshop, "clock")
    ended = run.train(run.fault("set_clock_back", "batch", 7, rank=0), *_HANG)  # rank 0 writes metrics and checkpoints
    assert ended.status == exit_codes.FINISHED, ended.stderr
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    times = [line["wall_time_s"] for line in lines]
    assert min(later - earlier for earlier, later in itertools.pairwise(times)) < -86_400, "the clock was not set back"
    assert all(line["perf/step_ms"] > 0 for line in lines if line.get("perf/step_ms") is not None)
    return run.done(0)


def two_jobs_on_one_folder(workshop: Workshop) -> int:
    """The second is refused with the name of the first, which does not notice."""
    run = Run(workshop, "two_jobs")
    refused = run.folder / "second_was_refused"
    first = run.start(run.fault("sleep", "batch", 7, seconds=0, wait_for=str(refused)))
    try:
        wait_until((run.folder / "sleep_happened").exists, "step 7")
        second = Run(workshop, "two_jobs_other", output=run.output).train(restarts=1)
        assert second.status == exit_codes.NO_FILE_ACCESS, second.stderr
        holder = f"host {socket.gethostname()}, process "
        second.says(f"OUTPUT_DIR {run.output} is in use by another job", holder, ", started ")
    finally:
        refused.touch()
    ended = finish(first)
    assert ended.status == exit_codes.FINISHED, ended.stderr
    return run.done(0)


def _in_a_folder(case: typing.Callable[[pathlib.Path], None]) -> Case:
    """Makes a case of a fault that needs no job and loses no step."""

    @functools.wraps(case)
    def run(workshop: Workshop) -> int:
        folder = workshop.root / case.__name__
        folder.mkdir()
        case(folder)
        return 0

    return run


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        kill_worker_mid_step,
        kill_main_worker_mid_step,
        kill_worker_mid_checkpoint,
        kill_worker_before_the_commit,
        kill_agent,
        kill_all_workers,
        kill_worker_in_a_validation,
        kill_worker_while_it_loads,
        sigterm,
        sighup,
        sigint,
        file_cases.disk_full_while_saving,
        file_cases.disk_full_to_the_last_byte,
        file_cases.read_only_output,
        file_cases.half_written_newest_checkpoint,
        file_cases.truncated_checkpoint_shard,
        file_cases.flipped_bit_in_checkpoint_shard,
        file_cases.truncated_parquet_file,
        file_cases.flipped_bit_in_parquet_file,
        file_cases.data_file_vanishes_mid_epoch,
        hung_worker,
        hung_worker_that_holds_the_interpreter,
        frozen_worker,
        nan_in_one_rank,
        clock_jumps_back,
        two_jobs_on_one_folder,
        *reading_cases.CASES,
        *(_in_a_folder(case) for case in (*data_cases.CASES, *checkpoint_cases.CASES, *serving_cases.CASES)),
    )
}
QUICK = ("kill_worker_mid_step",)
"""In the default suite too; SIGTERM is there in integration/test_command_line.py."""
