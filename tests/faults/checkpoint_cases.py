"""Faults of checkpoints that need no job: stores, links, hostile names, damage of each file."""

import errno
import os
import pathlib
import typing

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from gpsd_dist.checkpoint import files, integrity, loading, manager, retention, state, storage
from gpsd_dist.checkpoint.__main__ import main
from tests.faults.data_cases import failing_opens, forked
from tests.faults.file_cases import flip_bit, mounted, truncate
from tests.unit.checkpoint.folders import add


def _damaged(folder: pathlib.Path, name: str, damage: typing.Callable[[pathlib.Path], None]) -> None:
    """The run goes on from the checkpoint before it; `verify` names the file."""
    before, newest = add(folder, 2, best_step=2), add(folder, 4, best_step=2)
    damage(newest / name)
    assert manager.newest_intact(folder / "checkpoints") == before
    status, output = forked(folder, lambda: main(["verify", str(folder)]))
    assert status == 1 and name in output, output


def flipped_bit_in_the_state(folder: pathlib.Path) -> None:
    _damaged(folder, retention.STATE_NAME, flip_bit)


def truncated_checksums(folder: pathlib.Path) -> None:
    _damaged(folder, integrity.CHECKSUMS_NAME, truncate)


def missing_checksums(folder: pathlib.Path) -> None:
    _damaged(folder, integrity.CHECKSUMS_NAME, pathlib.Path.unlink)


def missing_shard(folder: pathlib.Path) -> None:
    _damaged(folder, "__1_0.distcp", pathlib.Path.unlink)


def longer_shard(folder: pathlib.Path) -> None:
    _damaged(folder, "__1_0.distcp", lambda path: path.write_bytes(path.read_bytes() + b"x"))


def all_checkpoints_damaged(folder: pathlib.Path) -> None:
    """That is an error, and no fresh start."""
    for step in (2, 4):
        flip_bit(add(folder, step) / "__0_0.distcp")
    try:
        manager.newest_intact(folder / "checkpoints")
    except ValueError as error:
        assert "no checkpoint" in str(error) and "is intact" in str(error)
    else:
        raise AssertionError("the run would have started afresh")


def _status(folder: pathlib.Path, part: str, number: int) -> int:
    """Of `verify` where files with `part` in their path cannot be opened."""
    add(folder, 4)
    status, output = forked(folder, lambda: main(["verify", str(folder)]), failing_opens(part, number))
    assert "Traceback" not in output and os.strerror(number) in output, output
    return status


def shard_unreadable(folder: pathlib.Path) -> None:
    assert _status(folder, ".distcp", errno.EIO) == 74


def checksums_unreadable(folder: pathlib.Path) -> None:
    assert _status(folder, "checksums.json", errno.ESTALE) == 74


def store_out_of_reach(folder: pathlib.Path) -> None:
    """A store that does not answer is neither empty nor damaged."""
    place = storage.location(f"s3://bucket/{folder.name}")
    try:
        os.environ |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        os.environ |= {"AWS_MAX_ATTEMPTS": "1", "AWS_DEFAULT_REGION": "us-east-1"}
        try:
            retention.complete(place / "checkpoints")
        except OSError:
            return
        raise AssertionError("a store that does not answer looked empty")
    finally:
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_MAX_ATTEMPTS"):
            os.environ.pop(name, None)


def link_in_place_of_best_json(folder: pathlib.Path) -> None:
    """Nothing outside is written."""
    add(folder, 4, best_step=4)
    victim = folder / "victim"
    victim.write_text("precious")
    (folder / "checkpoints" / "best.json").symlink_to(victim)
    try:
        retention.write_best(folder / "checkpoints")
    except OSError as error:
        assert "best.json is a link" in str(error)
    assert victim.read_text() == "precious"


def link_in_place_of_a_save(folder: pathlib.Path) -> None:
    """A file of a checkpoint is never written through a link."""
    (folder / "saved").mkdir()
    victim = folder / "victim"
    victim.write_text("precious")
    (folder / "saved" / "__0_0.distcp").symlink_to(victim)
    try:
        dcp.save({"w": torch.ones(3)}, storage_writer=files.Writer(folder / "saved"), no_dist=True)
    except CheckpointException as error:
        assert victim.read_text() == "precious", error
    else:
        raise AssertionError("it was written through the link")


def orders_to_a_terminal_in_a_state(folder: pathlib.Path) -> None:
    """ESC in what a damaged state says is shown as text."""
    newest = add(folder, 4)
    (newest / "run_state.json").write_text('{"\\u001b]0;title\\u0007": 1}')
    for command in (["list", str(folder)], ["verify", str(folder)], ["diff", str(folder), str(folder)]):
        _, output = forked(folder, lambda command=command: main(command))
        assert "\x1b" not in output and "\x07" not in output, output


def checkpoint_of_a_newer_version(folder: pathlib.Path) -> None:
    """No damage: the run does not go back, but says which version to use."""
    add(folder, 2)
    newest = add(folder, 4)
    path = newest / "run_state.json"
    path.write_text(path.read_text()[:-1] + ', "of_the_future": 1}')
    sums = integrity.read_checksums(newest)
    files_now = sums.files | {path.name: integrity.sum_of(path.read_bytes())}
    (newest / integrity.CHECKSUMS_NAME).write_bytes(integrity.Checksums(1.0, files_now).to_json())
    try:
        manager.newest_intact(folder / "checkpoints")
    except state.OtherVersion as error:
        assert "of_the_future" in str(error)
    else:
        raise AssertionError("the run would have gone back")


def prune_on_a_read_only_disk(folder: pathlib.Path) -> None:
    """Nothing is deleted by halves: the marker goes first."""
    with mounted(folder / "disk", "size=4m"):
        for step in (2, 4):
            add(folder / "disk", step)
        os.system(f"mount -o remount,ro {folder / 'disk'}")
        status, output = forked(folder, lambda: main(["prune", str(folder / "disk"), "--keep_last", "1"]))
        assert status == 2 and "Read-only" in output, output
        assert len(retention.complete(folder / "disk" / "checkpoints")) == 2


def loading_into_another_model(folder: pathlib.Path) -> None:
    """A shape that does not fit is an error before a weight is touched."""
    dcp.save({"w": torch.ones(3)}, storage_writer=files.Writer(folder / "saved"), no_dist=True)
    mine = torch.zeros(4)
    try:
        loading.fill_tensors(folder / "saved", {"w": mine})
    except ValueError as error:
        assert "does not fit this model" in str(error)
    assert not mine.any()


CASES = (
    flipped_bit_in_the_state,
    truncated_checksums,
    missing_checksums,
    missing_shard,
    longer_shard,
    all_checkpoints_damaged,
    shard_unreadable,
    checksums_unreadable,
    store_out_of_reach,
    link_in_place_of_best_json,
    link_in_place_of_a_save,
    orders_to_a_terminal_in_a_state,
    checkpoint_of_a_newer_version,
    prune_on_a_read_only_disk,
    loading_into_another_model,
)
