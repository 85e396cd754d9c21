"""The faults, one function each: it breaks a real job, lets it go on, and returns the steps that had to be repeated.

Every one ends with the run equal, bit for bit, to the run that was never disturbed.
"""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import typing

import pyarrow.parquet as pq
import pytest

from gpsd_dist import exit_codes
from tests.faults.jobs import SAVE_INTERVAL, Run, Workshop, finish, wait_until
from tests.integration.tiny_data import step_folder

Case = typing.Callable[[Workshop], int]
_HANG = ("--gin.TrainConfig.hang_timeout_s=8",)  # a step takes about 0.05 s; four times as long in the first step


def _done(run: Run, at_most: int) -> int:
    run.check_equals_reference()
    lost = run.steps_lost()
    assert lost <= at_most, f"{lost} steps were repeated, at most {at_most} are promised"
    return lost


def _recovers(
    workshop: Workshop, name: str, at_most: int, what: str, place: str, step: int, *words, options=(), **more
):
    """torchrun starts the ranks again, and the job ends well by itself."""
    run = Run(workshop, name)
    ended = run.train(run.fault(what, place, step, **more), *options, restarts=1)
    assert ended.status == exit_codes.FINISHED, ended.stderr
    ended.says(f"fault: {what}", "weights: resumed from", *words)
    return _done(run, at_most)


def kill_worker_mid_step(workshop: Workshop) -> int:
    """Dense gradients are there, the tables are not updated yet. The newest checkpoint may still be in the making."""
    return _recovers(workshop, "kill_mid_step", 2 * SAVE_INTERVAL, "kill_self", "backward", 7, "exitcode: -9")


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
    again = run.train()
    assert again.status == exit_codes.FINISHED, again.stderr
    again.says("weights: resumed from")
    return _done(run, 0)


def _stopped(workshop: Workshop, name: str, signal_name: str, status: int) -> int:
    run = Run(workshop, name)
    ended = run.train(run.fault("signal_launcher", "batch", 7, signal=signal_name), restarts=1)
    assert ended.status == status, ended.stderr
    ended.says("asked to stop: saved step")
    assert ended.stderr.splitlines()[-1].startswith("launcher: ")
    again = run.train()
    assert again.status == exit_codes.FINISHED, again.stderr
    again.says("weights: resumed from")
    return _done(run, 0)


def sigterm(workshop: Workshop) -> int:
    """Preemption: a status that a scheduler starts again, and no step is lost."""
    return _stopped(workshop, "sigterm", "SIGTERM", exit_codes.STOPPED)


def sigint(workshop: Workshop) -> int:
    """Ctrl-C: saved as well, but a person wanted it."""
    return _stopped(workshop, "sigint", "SIGINT", exit_codes.INTERRUPTED)


@contextlib.contextmanager
def _mounted(folder: pathlib.Path, *options: str) -> typing.Iterator[None]:
    folder.mkdir(exist_ok=True)
    result = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True)
    if result.returncode:
        pytest.skip(f"a file system of our own is needed: {result.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _disk_full(workshop: Workshop, name: str, bytes_left: int, *words: str) -> int:
    run = Run(workshop, name)
    with _mounted(run.folder / "small", "size=8m"):
        run.output = run.folder / "small" / "run"
        saved = str(step_folder(run.output, 6) / "run_state.json")
        folder = str(run.folder / "small")
        fault = run.fault("fill_disk", "batch", 7, rank=0, folder=folder, bytes_left=bytes_left, wait_for=saved)
        ended = run.train(fault)
        assert ended.status == exit_codes.NO_FILE_ACCESS, ended.stderr
        errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        for error in errors:  # one per rank; whether metrics or checkpoint fail first on rank 0 depends on the moment
            assert os.strerror(errno.ENOSPC) in error and f"Safe: {step_folder(run.output, 6)}" in error, error
        for word in words:
            assert any(word in error for error in errors), errors
        (run.folder / "small" / "filler").unlink()
        again = run.train()
        assert again.status == exit_codes.FINISHED, again.stderr
        return _done(run, SAVE_INTERVAL + 2)


def disk_full_while_saving(workshop: Workshop) -> int:
    """Names the checkpoint that was not written and the one that is safe; with space again the command goes on."""
    return _disk_full(workshop, "disk_full", 65_536, "step_00000008 was not written")


def disk_full_to_the_last_byte(workshop: Workshop) -> int:
    """Then the metrics fail before the checkpoint does."""
    return _disk_full(workshop, "disk_very_full", 0, "were not written, ", "disk_very_full/small/run: ")


def read_only_output(workshop: Workshop) -> int:
    """Known before anything is trained."""
    run = Run(workshop, "read_only")
    with _mounted(run.folder / "fixed", "ro"):
        run.output = run.folder / "fixed" / "run"
        ended = run.train()
    assert ended.status == exit_codes.NO_FILE_ACCESS, ended.stderr
    ended.says(f"OUTPUT_DIR {run.output} cannot be written, so nothing was trained", os.strerror(errno.EROFS))
    assert not list((run.folder / "trace").iterdir()) or not (run.folder / "trace" / "rank0").read_text()
    run.output = run.folder / "run"
    assert run.train().status == exit_codes.FINISHED
    return _done(run, 0)


def _stopped_at(run: Run, step: int) -> None:
    """Saved after `step`, and left."""
    ended = run.train(run.fault("signal_launcher", "batch", step, signal="SIGTERM"))
    assert ended.status == exit_codes.STOPPED, ended.stderr


def _goes_on(run: Run, *words: str) -> None:
    ended = run.train()
    assert ended.status == exit_codes.FINISHED, ended.stderr
    ended.says(*words)


def half_written_newest_checkpoint(workshop: Workshop) -> int:
    """Folders of saves that never ended are not even looked at."""
    run = Run(workshop, "half_written")
    _stopped_at(run, 9)
    newest = step_folder(run.output, max(_saved(run)))
    (run.output / "checkpoints" / "step_00000017").mkdir()
    shutil.copytree(newest, run.output / "checkpoints" / ".step_00000018.partial")
    half = step_folder(run.output, 16)
    shutil.copytree(newest, half)
    (half / "run_state.json").unlink()
    _goes_on(run, f"weights: resumed from {newest}")
    return _done(run, 0)


def _saved(run: Run) -> list[int]:
    return sorted(int(path.name[5:13]) for path in (run.output / "checkpoints").glob("step_*"))


def _damaged_checkpoint(workshop: Workshop, name: str, damage: typing.Callable[[pathlib.Path], None]) -> int:
    run = Run(workshop, name)
    _stopped_at(run, 9)
    *_, before, newest = _saved(run)
    shard = max(step_folder(run.output, newest).glob("*.distcp"), key=lambda path: path.stat().st_size)
    damage(shard)
    ended = run.train()
    assert ended.status == exit_codes.FINISHED, ended.stderr
    ended.says(shard.name, "trying the checkpoint before it", f"resumed from {step_folder(run.output, before)}")
    return _done(run, newest - before)


def truncate(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip_bit(path: pathlib.Path) -> None:
    """In the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def truncated_checkpoint_shard(workshop: Workshop) -> int:
    """The run goes back to the checkpoint before it."""
    return _damaged_checkpoint(workshop, "truncated_shard", truncate)


def flipped_bit_in_checkpoint_shard(workshop: Workshop) -> int:
    """Found by its checksum."""
    return _damaged_checkpoint(workshop, "flipped_shard", flip_bit)


def _damaged_data(
    workshop: Workshop, name: str, damage: typing.Callable[[pathlib.Path], None], *words: str, at_most: int = 0
) -> int:
    """Stops with the name of the file, is not started again; with the file repaired, the same command goes on."""
    run = Run(workshop, name)
    data_dir = run.own_data()
    _stopped_at(run, 9)
    [path] = (data_dir / "pretrain").glob("*.parquet")
    content = path.read_bytes()
    damage(path)
    ended = run.train(restarts=1)
    assert ended.status == exit_codes.MISTAKE, ended.stderr
    ended.says("error: ", str(path), *words)
    assert "attempts left" not in ended.stderr
    path.write_bytes(content)
    _goes_on(run, "weights: resumed from")
    return _done(run, at_most)


def truncated_parquet_file(workshop: Workshop) -> int:
    """Its footer is gone."""
    return _damaged_data(workshop, "truncated_data", truncate, "truncated or not a Parquet file")


def flipped_bit_in_parquet_file(workshop: Workshop) -> int:
    """In a page: found by its checksum when a batch wants the row group, with its number. Until then steps are done."""

    def flip_in_page(path: pathlib.Path) -> None:
        content = bytearray(path.read_bytes())
        content[_page_byte(path)] ^= 16
        path.write_bytes(content)

    words = "row group 0 cannot be decoded", "CRC checksum"
    return _damaged_data(workshop, "flipped_data", flip_in_page, *words, at_most=SAVE_INTERVAL)


def _page_byte(path: pathlib.Path) -> int:
    """Position of a byte inside the data page of column user_hash of row group 0."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    [column] = [column for column in columns if column.path_in_schema == "user_hash"]
    start = column.dictionary_page_offset or column.data_page_offset
    return start + column.total_compressed_size - 5


def data_file_vanishes_mid_epoch(workshop: Workshop) -> int:
    """The file of the validation that comes next."""
    run = Run(workshop, "vanishing")
    [path] = (run.own_data() / "valid").glob("*.parquet")
    ended = run.train(run.fault("move_away", "batch", 3, path=str(path)), restarts=1)
    assert ended.status == exit_codes.MISTAKE, ended.stderr
    ended.says(f"{path} does not exist")
    os.rename(f"{path}.gone", path)
    _goes_on(run, "weights: ")
    return _done(run, SAVE_INTERVAL + 2)


def hung_worker(workshop: Workshop) -> int:
    """The watchdog of each rank says where it stands; torchrun starts all again."""
    words = ("watchdog: rank 1", "Step 7, in 'dense backward'", "last collective begun: dense backward of step 7",
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
    return _done(run, 0)


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
    return _done(run, 0)


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        kill_worker_mid_step,
        kill_main_worker_mid_step,
        kill_worker_mid_checkpoint,
        kill_worker_before_the_commit,
        kill_agent,
        sigterm,
        sigint,
        disk_full_while_saving,
        disk_full_to_the_last_byte,
        read_only_output,
        half_written_newest_checkpoint,
        truncated_checkpoint_shard,
        flipped_bit_in_checkpoint_shard,
        truncated_parquet_file,
        flipped_bit_in_parquet_file,
        data_file_vanishes_mid_epoch,
        hung_worker,
        hung_worker_that_holds_the_interpreter,
        frozen_worker,
        nan_in_one_rank,
        clock_jumps_back,
        two_jobs_on_one_folder,
    )
}
QUICK = ("kill_worker_mid_step",)
"""In the default suite too; SIGTERM is there in integration/test_command_line.py."""
