"""Checkpoints from before `index.json` are read from DCP's pickle; a pickle that would run code is refused unrun."""

import contextlib
import dataclasses
import enum
import os
import pathlib
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from gpsd_dist.checkpoint import files, index, loading
from gpsd_dist.checkpoint.pickled_index import unpickled

ITEM = MetadataIndex("item", [0, 0])


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with the tensor `item` [4, 3], without `index.json`."""
    dcp.save({"item": torch.ones(4, 3)}, storage_writer=files.Writer(tmp_path / "saved"), no_dist=True)
    (tmp_path / "saved/index.json").unlink()
    return tmp_path / "saved"


def _change(saved, change) -> None:
    """Rewrites the index."""
    read = pickle.loads((saved / ".metadata").read_bytes())
    change(read)
    (saved / ".metadata").write_bytes(pickle.dumps(read))


def _refused(saved, message: str) -> bool:
    """Whether the error names the index; it must be one."""
    with pytest.raises(ValueError, match=message) as error:
        loading.fill_tensors(saved, {"item": torch.zeros(4, 3)})
    return str(saved / ".metadata") in str(error.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_protocol_is_read(saved, protocol):
    read = pickle.loads((saved / ".metadata").read_bytes())
    (saved / ".metadata").write_bytes(pickle.dumps(read, protocol))
    ours = index.read_index(saved)
    assert ours.state_dict_metadata == read.state_dict_metadata and ours.storage_data == read.storage_data


class EarlyPickler(pickle.Pickler):
    """Pickles a member of an enum as Python 3.11.2 does."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


@pytest.mark.parametrize("protocol", [2, 5])
def test_members_of_enums_in_the_form_of_early_3_11_are_read(saved, protocol):
    read = pickle.loads((saved / ".metadata").read_bytes())
    with (saved / ".metadata").open("wb") as file:
        EarlyPickler(file, protocol).dump(read)
    assert b"getattr" in (saved / ".metadata").read_bytes()
    assert index.read_index(saved).state_dict_metadata == read.state_dict_metadata


def test_what_dcp_itself_writes_is_read(tmp_path):
    """DCP puts a path into the index, and torch its types."""
    every = {str(t): torch.ones(2, dtype=t) for t in (torch.float64, torch.float16, torch.int64, torch.bool)}
    dcp.save(every, checkpoint_id=str(tmp_path), no_dist=True)
    assert b"pathlib" in (tmp_path / ".metadata").read_bytes()
    loaded = {name: torch.zeros_like(value) for name, value in every.items()}
    loading.fill_tensors(tmp_path, loaded)
    assert all(torch.equal(loaded[name], value) for name, value in every.items())


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/b", "..", "", "a\0b", 7, None])
def test_a_file_outside_the_folder_is_refused(saved, path):
    _change(saved, lambda read: setattr(read.storage_data[ITEM], "relative_path", path))
    assert _refused(saved, "which is no file of the checkpoint's folder|is broken")


class _Size:
    """Pickles as torch.Size of anything."""

    def __init__(self, *size):
        self.size = size

    def __reduce__(self):
        return torch.Size, (self.size,)


@pytest.mark.parametrize("size", [(4, 10**14), (2**62, 2**62), (-4, 3), (1,) * 17, (4, 2), (5, 3), (4.5, 3), ("4", 3)])
def test_a_shape_that_its_chunks_do_not_make_up_is_refused(saved, size):
    _change(saved, lambda read: setattr(read.state_dict_metadata["item"], "size", _Size(*size)))
    assert _refused(saved, "do not make up its shape|a shape is no list|has a chunk of|is broken")


@pytest.mark.parametrize(("field", "value"), [("length", -1), ("offset", -1), ("offset", 1.5), ("length", None)])
def test_a_place_that_is_none_is_refused(saved, field, value):
    _change(saved, lambda read: setattr(read.storage_data[ITEM], field, value))
    assert _refused(saved, "has no place in __0_0.distcp|is broken")


def test_a_transformed_tensor_is_refused(saved):
    """DCP would unpack it while reading, whatever its size."""
    _change(saved, lambda read: setattr(read.storage_data[ITEM], "transform_descriptors", ["stream.zstd"]))
    assert _refused(saved, "transformed form")


def test_an_index_without_its_parts_is_refused(saved):
    read = pickle.loads((saved / ".metadata").read_bytes())
    no_files = dataclasses.replace(read, storage_data={})
    for broken in (no_files, dataclasses.replace(read, storage_data=None), dataclasses.replace(read, storage_data=[])):
        (saved / ".metadata").write_bytes(pickle.dumps(broken))
        assert _refused(saved, "it is broken")


def test_an_index_with_an_entry_that_dcp_would_unpickle_is_refused(saved):
    """DCP loads an entry that is not a tensor with `weights_only=False`."""
    _change(saved, lambda read: read.state_dict_metadata.update(other=BytesStorageMetadata()))
    assert _refused(saved, r"asks for .*BytesStorageMetadata")


def test_one_list_of_chunks_in_many_tensors_takes_no_time(saved):
    def change(read):
        entry, place = read.state_dict_metadata["item"], read.storage_data[ITEM]
        entry.chunks = entry.chunks * 300
        for name in map(str, range(1000)):
            read.state_dict_metadata[name], read.storage_data[MetadataIndex(name, [0, 0])] = entry, place

    _change(saved, change)
    assert _refused(saved, "more chunks than bytes")


class _Runs:
    """Unpickling this makes a file: what a stranger's pickle may do."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class _Calls:
    """Makes a file through builtins."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("attack", [_Runs, _Calls])
@pytest.mark.parametrize("is_hidden", [False, True])
def test_an_index_that_would_run_code_is_refused_and_not_run(saved, attack, is_hidden):
    proof = saved.parent / "proof"
    if is_hidden:  # inside an index that is otherwise right
        _change(saved, lambda read: setattr(read, "planner_data", attack(proof)))
    else:
        (saved / ".metadata").write_bytes(pickle.dumps(attack(proof)))
    for read in (loading.saved_keys, lambda folder: loading.fill_tensors(folder, {"item": torch.zeros(4, 3)})):
        with pytest.raises(ValueError, match="nothing of it was run") as error:
            read(saved)
        assert str(saved / ".metadata") in str(error.value)
    assert not proof.exists()
    with contextlib.suppress(AttributeError):  # the attack is real: DCP's own reader runs it
        dcp.FileSystemReader(str(saved)).read_metadata()
    assert proof.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    ],
)
def test_an_import_is_refused_and_named(content):
    with pytest.raises(ValueError, match=r"asks for os.system, .*nothing of it was run"):
        unpickled(content)


def test_an_allowed_class_is_neither_imported_nor_changed():
    """BUILD on a class of torch would set its attributes in this process."""
    made = unpickled(b"\x80\x02ctorch\nSize\n.")
    assert made.name == "torch.Size" and made is not torch.Size
    with pytest.raises(TypeError):
        unpickled(b"\x80\x02ctorch\nSize\n}b.")


def test_a_bomb_of_references_takes_neither_time_nor_memory():
    """Python's own unpickler in C hashes a tuple of 2^60 leaves, and makes room for 2^32 entries of its memo."""
    nested: tuple = ()
    for _ in range(60):
        nested = (nested, nested)
    ((key, value),) = unpickled(b"\x80\x02}(" + pickle.dumps(nested, 2)[2:-1] + b"K\x01u.").items
    assert value == 1 and len(key) == 2
    assert unpickled(b"\x80\x02Nr\xff\xff\xff\xff.") is None


@pytest.mark.parametrize("where", ["fqn", "relative_path", "offset"])
def test_a_bomb_in_place_of_a_value_is_refused_at_once(saved, where):
    nested: tuple = ()
    for _ in range(60):
        nested = (nested, nested)

    def change(read):
        ((key, place),) = read.storage_data.items()
        object.__setattr__(key if where == "fqn" else place, where, nested)

    _change(saved, change)
    assert _refused(saved, "is broken")


@pytest.mark.parametrize(
    "content",
    [b"", b"half", pickle.dumps({}), pickle.dumps(Metadata({}))[:-3], pickle.dumps(torch.float32), b"\x80\x04}."],
)
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="refused as the index of a checkpoint") as error:
        index.read_index(tmp_path)
    assert str(tmp_path / ".metadata") in str(error.value)
