import dataclasses

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gpsd_dist.batch import transfer
from gpsd_dist.batch.batch import Batch
from gpsd_dist.batch.packing import Bucket, Packing
from gpsd_dist.batch.transfer import pinned, to_device
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.parquet_dataset import BatchKey
from gpsd_dist.tables.prefetch import PrefetchedParts
from tests.helpers.synthetic import make_manifest, make_rows

MANIFEST = dataclasses.replace(make_manifest(), unbounded={"tag": "managed"})
META = torch.device("meta")


def make_batch(split):
    is_pretraining = split == "pretrain"
    collate = Collate(
        MANIFEST,
        ("item", "tag"),
        max_history_length=20,
        with_candidates=not is_pretraining,
        negatives_per="group" if is_pretraining else None,
        num_negatives=3,
        token_multiple=16,
    )
    [batch] = collate(make_rows(MANIFEST, split, seed=0, num_rows=12), BatchKey(0, 0, 0))
    weights = {"weight": torch.ones(len(batch.candidate_item_C))}
    return batch if is_pretraining else dataclasses.replace(batch, sampling=weights)


def tensors(value, path="batch", *, with_buckets=True):
    """(path, tensor) of everything reachable, by generic recursion over attributes."""
    if isinstance(value, Bucket) and not with_buckets:
        return
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, KeyedJaggedTensor):
        yield f"{path}.values", value.values()
        yield f"{path}.lengths", value.lengths()
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name), f"{path}.{field.name}", with_buckets=with_buckets)
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from tensors(entry, f"{path}[{key}]", with_buckets=with_buckets)
    elif isinstance(value, tuple | list):
        for index, entry in enumerate(value):
            yield from tensors(entry, f"{path}[{index}]", with_buckets=with_buckets)
    elif not isinstance(value, np.ndarray):  # stays on the host
        assert value is None or isinstance(value, int | str | float), f"{path} is a {type(value)}: how is it copied?"


@pytest.mark.parametrize("split", ["pretrain", "train"])
def test_to_moves_every_tensor_and_keeps_everything_else(split):
    batch = make_batch(split)
    before, moved = (dict(tensors(b, with_buckets=False)) for b in (batch, batch.to(META)))
    assert len(before) > 20 and list(before) == list(moved)
    for path, tensor in moved.items():
        assert tensor.device == META, path
        assert (tensor.shape, tensor.dtype) == (before[path].shape, before[path].dtype), path
    assert batch.to(META).lookup.keys() == batch.lookup.keys()
    assert all(tensor.device.type == "cpu" for tensor in before.values())


def test_length_buckets_go_to_the_device_when_they_are_read():
    """Flash attention and HSTU's kernels need none: there they would be copied for nothing."""
    packing = make_batch("train").packing
    moved = to_device(packing, META)
    assert {tensor.device.type for _, tensor in tensors(moved.buckets)} == {"cpu"}
    read = moved.device_buckets
    assert {tensor.device.type for _, tensor in tensors(read)} == {"meta"} and read is moved.device_buckets
    assert [path for path, _ in tensors(read)] == [path for path, _ in tensors(packing.buckets)]
    shapes = [(t.shape, t.dtype) for _, t in tensors(read)]
    assert shapes == [(t.shape, t.dtype) for _, t in tensors(packing.buckets)] and len(shapes) > 5


@pytest.mark.parametrize("split", ["pretrain", "train"])
def test_to_the_same_device_changes_no_value(split):
    batch = make_batch(split)
    before, after = dict(tensors(batch)), dict(tensors(batch.to(torch.device("cpu"))))
    for path, tensor in after.items():
        torch.testing.assert_close(tensor, before[path], rtol=0, atol=0, equal_nan=True)
    plain = {f.name: getattr(batch.packing, f.name) for f in dataclasses.fields(Packing) if f.type in ("int", int)}
    copied = batch.to(torch.device("cpu")).packing
    assert plain == {name: getattr(copied, name) for name in plain} and len(plain) == 5


class Spy(torch.Tensor):
    """Records what streams touch: this machine need not have a GPU."""

    seen: list = []  # noqa: RUF012

    def record_stream(self, stream):
        Spy.seen.append(self.data_ptr())


def spied(value):
    """The same structure with every tensor a Spy."""
    return transfer.map_tensors(value, lambda tensor: tensor.clone().as_subclass(Spy), {})


@pytest.mark.parametrize("split", ["pretrain", "train"])
def test_streams_touch_every_tensor_once(split, monkeypatch):
    batch = spied(make_batch(split))
    monkeypatch.setattr(Spy, "seen", [])
    batch.record_stream(None)
    expected = sorted(tensor.data_ptr() for _, tensor in tensors(batch, with_buckets=False))
    assert sorted(Spy.seen) == expected and len(expected) > 20


@pytest.fixture
def blocks(monkeypatch):
    """Blocks that `pinned` makes, in memory that is not page-locked."""
    made = []

    def page_locked(num_bytes):
        made.append(torch.empty(num_bytes, dtype=torch.uint8))
        return made[-1]

    monkeypatch.setattr(transfer, "page_locked", page_locked)
    return made


def copies_to(device, value, monkeypatch, *, with_host_parts=False):
    """(value on the device, bytes of each copy)."""
    copies, to = [], torch.Tensor.to

    def noting(tensor, *args, **kwargs):
        copies.append(tensor.nbytes)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", noting)
    moved = to_device(value, device, with_host_parts=with_host_parts)
    monkeypatch.undo()
    return moved, copies


@pytest.mark.parametrize("split", ["pretrain", "train"])
def test_a_pinned_batch_has_the_same_values_in_one_block_and_travels_in_one_copy(split, blocks, monkeypatch):
    batch = make_batch(split)
    locked = pinned(batch)
    before, after = dict(tensors(batch)), dict(tensors(locked))
    assert list(before) == list(after)
    for path, tensor in after.items():
        torch.testing.assert_close(tensor, before[path], rtol=0, atol=0, equal_nan=True)
        assert tensor.is_contiguous() and tensor.data_ptr() % transfer._ALIGNMENT == blocks[0].data_ptr() % 64, path
        assert any(getattr(tensor, transfer._BLOCK) is block for block in blocks), path
    assert len(blocks) == 3  # what every step reads, and the buckets of the batch and of the padded one
    moved, copies = copies_to(META, locked, monkeypatch)
    assert copies == [blocks[0].nbytes]
    shapes = [(path, tensor.shape, tensor.dtype) for path, tensor in tensors(moved, with_buckets=False)]
    assert shapes == [(path, tensor.shape, tensor.dtype) for path, tensor in tensors(batch, with_buckets=False)]
    _, copies = copies_to(META, locked.packing.buckets, monkeypatch, with_host_parts=True)
    assert len(copies) == 1 and copies[0] in [block.nbytes for block in blocks[1:]]


def test_a_block_that_has_arrived_holds_every_tensor_at_its_place(blocks):
    """Meta tensors have no values, so the device is this one under another name."""
    batch = make_batch("train")
    locked = pinned(batch)

    class Elsewhere:
        type = "elsewhere"

    to = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda tensor, device, **kwargs: to(tensor, "cpu", copy=True))
        moved = to_device(locked, Elsewhere())
    for block in blocks:
        block.fill_(255)  # what was copied must not be read from here
    before = dict(tensors(batch, with_buckets=False))
    for path, tensor in tensors(moved, with_buckets=False):
        torch.testing.assert_close(tensor, before[path], rtol=0, atol=0, equal_nan=True)


def test_what_parts_share_is_pinned_and_copied_once(blocks, monkeypatch):
    """Gradient accumulation: the lookup of the step stands in every part, and the ids of managed tables with it."""
    collate = Collate(MANIFEST, ("item", "tag"), 20, True, num_parts=3)
    parts = collate(make_rows(MANIFEST, "train", seed=0, num_rows=12), BatchKey(0, 0, 0))
    different = {id(tensor) for _, tensor in tensors(parts)}
    assert len(parts) == 3 and len(different) < len(list(tensors(parts))) - 3
    for moved in (to_device(parts, META), PrefetchedParts(parts).to(META).parts):
        assert len({id(tensor) for _, tensor in tensors(moved)}) == len(different)
        assert moved[2].lookup.values() is moved[0].lookup.values()
        assert [path for path, _ in tensors(moved)] == [path for path, _ in tensors(parts)]
    locked = pinned(parts)
    assert locked[2].lookup.values() is locked[0].lookup.values()
    assert len({id(tensor) for _, tensor in tensors(locked)}) == len(different)
    moved, copies = copies_to(META, locked, monkeypatch)
    assert copies == [blocks[0].nbytes] and moved[2].lookup.values() is moved[0].lookup.values()
    assert len(blocks) == 4  # one, and the buckets of each part


def test_every_field_of_a_batch_occurs_in_these_tests():
    """A new field that holds tensors must be in one of the two batches above."""
    paths = {path for split in ("pretrain", "train") for path, _ in tensors(make_batch(split))}
    for field in dataclasses.fields(Batch):
        if field.name in ("epoch_and_step", "num_read_tokens"):  # numbers of the host
            continue
        assert any(path.startswith(f"batch.{field.name}") for path in paths), field.name
    assert any(".candidate.entry" in path for path in paths) and any(".history.slot" in path for path in paths)


def test_number_of_requests_is_that_of_the_packing():
    assert make_batch("train").packing.num_requests == 12
    assert Packing.from_lengths(np.zeros(0, np.int64), np.zeros(0, np.int64)).num_requests == 0
