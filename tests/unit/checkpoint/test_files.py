"""What is written is hashed and read back."""

import contextlib
import errno
import hashlib
import os
import types

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
    dcp.save(files.Staging().copy(TENSORS), storage_writer=writer, no_dist=True)
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
    live, staging = _zeros(), files.Staging()
    first = staging.copy(live)
    live["table"]["item"].fill_(1.0)
    assert not first["table"]["item"].any()
    memory = first["table"]["item"].data_ptr()
    second = staging.copy(live)
    assert second["table"]["item"].data_ptr() == memory and bool((second["table"]["item"] == 1).all())
    live["table"]["item"] = torch.zeros(9)  # another shape: fresh memory
    assert staging.copy(live)["table"]["item"].shape == (9,)


def test_staged_has_what_is_there_now():
    staging = files.Staging()
    staging.copy({"a": {"y": torch.ones(1)}, "c": {}})
    copies = staging.copy({"a": {"x": torch.ones(1)}, "b": {}})
    assert copies == {"a": {"x": torch.ones(1)}, "b": {}}


def test_memory_that_cannot_be_page_locked_is_a_warning_and_ends_no_later_step(monkeypatch):
    """CUDA remembers an error until it is asked for it, which torch does behind each kernel."""
    remembered, warned = [], []

    def lock(*_):
        remembered.append(2)
        return 2

    def launch(*_, **__):
        if remembered:
            raise RuntimeError(f"CUDA error {remembered.pop()}")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: types.SimpleNamespace(cudaHostRegister=lock))
    monkeypatch.setattr(files.log, "warning", lambda *args: warned.append(args))
    staging = files.Staging()
    staging.copy({"w": torch.ones(3)})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", launch)
        staging._lock()
    assert warned and not remembered


def test_staged_tensors_lie_side_by_side_without_rounding_each_up():
    """Page-locked memory of torch's own is rounded up to a power of two for each tensor."""
    sizes = [1025, 3, 0, 4097, 1]
    live = {str(number): torch.arange(size, dtype=torch.float32) for number, size in enumerate(sizes)}
    copies = files.Staging().copy(live | {"scalar": torch.tensor(7.0), "half": torch.ones(3, dtype=torch.bfloat16)})
    for name, value in live.items():
        assert torch.equal(copies[name], value)
        assert copies[name].untyped_storage().nbytes() == value.nbytes  # or DCP would copy it again
    assert copies["scalar"].shape == () and copies["half"].dtype == torch.bfloat16
    filled = [copy for copy in copies.values() if copy.numel()]
    span = max(copy.data_ptr() + copy.nbytes for copy in filled) - min(copy.data_ptr() for copy in filled)
    assert span < sum(copy.nbytes for copy in filled) + 64 * len(filled)
