import dataclasses

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gpsd_dist.batch.batch import Batch, pinned, to_device
from gpsd_dist.batch.packing import Bucket, Packing
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
    """Records what pinning and streams touch: this machine need not have a GPU."""

    seen: list = []  # noqa: RUF012

    def pin_memory(self):
        Spy.seen.append(self.data_ptr())
        return self

    def record_stream(self, stream):
        Spy.seen.append(self.data_ptr())


def spied(value):
    """The same structure with every tensor a Spy."""
    if isinstance(value, torch.Tensor):
        return value.clone().as_subclass(Spy)
    if isinstance(value, KeyedJaggedTensor):
        return KeyedJaggedTensor(value.keys(), spied(value.values()), lengths=spied(value.lengths()))
    if dataclasses.is_dataclass(value):
        return type(value)(**{field.name: spied(getattr(value, field.name)) for field in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {key: spied(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(spied(entry) for entry in value)
    return value


@pytest.mark.parametrize("split", ["pretrain", "train"])
@pytest.mark.parametrize("action", ["pin_memory", "record_stream"])
def test_pinning_and_streams_touch_every_tensor_once(split, action, monkeypatch):
    batch = spied(make_batch(split))
    monkeypatch.setattr(Spy, "seen", [])
    pinned(batch) if action == "pin_memory" else batch.record_stream(None)
    # Buckets are pinned, but copied by whoever reads them.
    read = tensors(batch, with_buckets=action == "pin_memory")
    expected = sorted(tensor.data_ptr() for _, tensor in read)
    assert sorted(Spy.seen) == expected and len(expected) > 20


def test_what_parts_share_is_pinned_and_copied_once(monkeypatch):
    """Gradient accumulation: the lookup of the step stands in every part, and the ids of managed tables with it."""
    collate = Collate(MANIFEST, ("item", "tag"), 20, True, num_parts=3)
    parts = collate(make_rows(MANIFEST, "train", seed=0, num_rows=12), BatchKey(0, 0, 0))
    different = {id(tensor) for _, tensor in tensors(parts)}
    assert len(parts) == 3 and len(different) < len(list(tensors(parts))) - 3
    for moved in (to_device(parts, META), PrefetchedParts(parts).to(META).parts):
        assert len({id(tensor) for _, tensor in tensors(moved)}) == len(different)
        assert moved[2].lookup.values() is moved[0].lookup.values()
        assert [path for path, _ in tensors(moved)] == [path for path, _ in tensors(parts)]
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append(id(tensor)) or tensor)
    pinned(parts)
    assert sorted(calls) == sorted(different)


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
