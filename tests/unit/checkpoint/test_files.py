"""What is written is hashed and read back."""

import contextlib
import errno
import hashlib
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp

from gpsd_dist.checkpoint import files, loading
from gpsd_dist.checkpoint.storage import location
from gpsd_dist.distributed.watchdog import Watchdog

TENSORS = {
    "table": {"item": torch.arange(12, dtype=torch.float32).reshape(4, 3)},
    "dense": {"w": torch.ones(5, dtype=torch.bfloat16), "step": torch.tensor(7.0)},
}


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    if request.param == "disk":
        return tmp_path / "saved"
    return location(f"memory://{tmp_path.name}/saved")


def _save(folder) -> files.Writer:
    writer = files.Writer(folder)
    dcp.save(files.staged(TENSORS, None), storage_writer=writer, no_dist=True)
    return writer


def _zeros() -> dict:
    return {kind: {name: torch.zeros_like(value) for name, value in part.items()} for kind, part in TENSORS.items()}


def test_files_are_hashed_as_written_and_tensors_come_back(folder):
    written = _save(folder).written
    assert (
        sorted(written)
        == sorted(path.name for path in folder.iterdir())
        == [
            ".metadata",
            "__0_0.distcp",
            "index.json",
        ]
    )
    for name, expected in written.items():
        with (folder / name).open("rb") as file:
            content = file.read()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (expected.sha256, expected.num_bytes)
    loaded = _zeros()
    dcp.load(loaded, storage_reader=files.Reader(folder), no_dist=True)
    for kind, part in TENSORS.items():
        assert all(torch.equal(loaded[kind][name], value) for name, value in part.items())
    assert loading.saved_keys(folder) == ["dense.step", "dense.w", "table.item"]


def test_a_tensor_is_read_shard_by_shard(folder):
    _save(folder)
    reader = files.Reader(folder)
    for kind, part in TENSORS.items():
        for name, value in part.items():
            (found,) = reader.row_shards(f"{kind}.{name}")
            assert torch.equal(found, value) and found.dtype == value.dtype


class _DiskFullOnce:
    """A path whose file refuses one write; later ones succeed, as where another file has gone meanwhile."""

    def __init__(self, refused: int):
        self.refused, self.name = refused, "file"

    def open(self, mode: str):
        return contextlib.nullcontext(self)

    def write(self, content) -> int:
        self.refused -= 1
        if self.refused == -1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(content)

    def flush(self) -> None:
        pass


def test_a_full_disk_is_named_at_every_write_of_a_tensor():
    """torch's zip writer reports its place in the file instead."""
    place = _DiskFullOnce(10**6)
    with files._Files(Watchdog()).create_stream(place, "wb") as stream:
        torch.save(torch.ones(3), stream)
    num_writes = 10**6 - place.refused
    assert num_writes > 5
    for refused in range(num_writes):
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            with files._Files(Watchdog()).create_stream(_DiskFullOnce(refused), "wb") as stream:
                torch.save(torch.ones(3), stream)


def test_staged_copies_do_not_change_with_the_live_tensors():
    live = _zeros()
    first = files.staged(live, None)
    live["table"]["item"].fill_(1.0)
    assert not first["table"]["item"].any()
    memory = first["table"]["item"].data_ptr()
    second = files.staged(live, first)
    assert second["table"]["item"].data_ptr() == memory and bool((second["table"]["item"] == 1).all())
    live["table"]["item"] = torch.zeros(9)  # another shape: fresh memory
    assert files.staged(live, second)["table"]["item"].shape == (9,)


def test_staged_has_what_is_there_now():
    copies = files.staged({"a": {"x": torch.ones(1)}, "b": {}}, {"a": {"y": torch.ones(1)}, "c": {}})
    assert copies == {"a": {"x": torch.ones(1)}, "b": {}}
