"""Faults of disks and files: full, read-only, damaged, gone. Otherwise as in `cases`."""

import contextlib
import errno
import os
import pathlib
import shutil
import subprocess
import typing

import pyarrow.parquet as pq
import pytest

from gpsd_dist.distributed import exit_codes
from tests.faults.jobs import SAVE_INTERVAL, Run, Workshop
from tests.integration.tiny_data import step_folder


@contextlib.contextmanager
def mounted(folder: pathlib.Path, *options: str) -> typing.Iterator[None]:
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
    with mounted(run.folder / "small", "size=8m"):
        run.output = run.folder / "small" / "run"
        saved = str(step_folder(run.output, 6) / "run_state.json")
        folder = str(run.folder / "small")
        fault = run.fault("fill_disk", "batch", 7, rank=0, folder=folder, bytes_left=bytes_left, wait_for=saved)
        ended = run.train(fault)
        assert ended.status == exit_codes.NO_FILE_ACCESS, ended.stderr
        errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        for error in errors:  # one per rank; which file fails first depends on the moment
            assert os.strerror(errno.ENOSPC) in error and f"Safe: {step_folder(run.output, 6)}" in error, error
        ended.says(*words)  # the last error, or what the log says of the save that was under way
        (run.folder / "small" / "filler").unlink()
        run.goes_on()
        return run.done(SAVE_INTERVAL + 2)


def disk_full_while_saving(workshop: Workshop) -> int:
    """Names the checkpoint that was not written and the one that is safe; with space again the command goes on."""
    return _disk_full(workshop, "disk_full", 65_536, "step_00000008 was not written")


def disk_full_to_the_last_byte(workshop: Workshop) -> int:
    """Then the metrics fail before the checkpoint does."""
    return _disk_full(workshop, "disk_very_full", 0, "were not written, ", "disk_very_full/small/run: ")


def read_only_output(workshop: Workshop) -> int:
    """Known before anything is trained."""
    run = Run(workshop, "read_only")
    with mounted(run.folder / "fixed", "ro"):
        run.output = run.folder / "fixed" / "run"
        ended = run.train()
    assert ended.status == exit_codes.NO_FILE_ACCESS, ended.stderr
    ended.says(f"OUTPUT_DIR {run.output} cannot be written, so nothing was trained", os.strerror(errno.EROFS))
    assert not list((run.folder / "trace").iterdir()) or not (run.folder / "trace" / "rank0").read_text()
    run.output = run.folder / "run"
    assert run.train().status == exit_codes.FINISHED
    return run.done(0)


def half_written_newest_checkpoint(workshop: Workshop) -> int:
    """Folders of saves that never ended are not even looked at."""
    run = Run(workshop, "half_written")
    run.stop_at(9)
    newest = step_folder(run.output, max(_saved(run)))
    (run.output / "checkpoints" / "step_00000017").mkdir()
    shutil.copytree(newest, run.output / "checkpoints" / ".step_00000018.partial")
    half = step_folder(run.output, 16)
    shutil.copytree(newest, half)
    (half / "run_state.json").unlink()
    run.goes_on(f"weights: resumed from {newest}")
    return run.done(0)


def _saved(run: Run) -> list[int]:
    return sorted(int(path.name[5:13]) for path in (run.output / "checkpoints").glob("step_*"))


def _damaged_checkpoint(workshop: Workshop, name: str, damage: typing.Callable[[pathlib.Path], None]) -> int:
    run = Run(workshop, name)
    run.stop_at(9)
    *_, before, newest = _saved(run)
    shard = max(step_folder(run.output, newest).glob("*.distcp"), key=lambda path: path.stat().st_size)
    damage(shard)
    run.goes_on(shard.name, "trying the checkpoint before it", f"resumed from {step_folder(run.output, before)}")
    return run.done(newest - before)


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
    run.stop_at(9)
    [path] = (data_dir / "pretrain").glob("*.parquet")
    content = path.read_bytes()
    damage(path)
    ended = run.train(restarts=1)
    assert ended.status == exit_codes.MISTAKE, ended.stderr
    ended.says("error: ", str(path), *words)
    assert "attempts left" not in ended.stderr
    path.write_bytes(content)
    run.goes_on("weights: resumed from")
    return run.done(at_most)


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
    run.goes_on("weights: ")
    return run.done(SAVE_INTERVAL + 2)
