"""An index that does not describe its files is refused before anything is read; what DCP writes is read in full."""

import dataclasses
import pickle
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from gpsd_dist.checkpoint import files, index, loading, pickled

ITEM = MetadataIndex("item", [0, 0])


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with the tensor `item` [4, 3]."""
    dcp.save({"item": torch.ones(4, 3)}, storage_writer=files.Writer(tmp_path / "saved"), no_dist=True)
    return tmp_path / "saved"


def _change(saved, change) -> None:
    """Rewrites the index."""
    read = pickle.loads((saved / ".metadata").read_bytes())
    change(read)
    (saved / ".metadata").write_bytes(pickle.dumps(read))


def _refused(saved, message: str) -> bool:
    """Whether the error names the checkpoint; it must be one."""
    with pytest.raises(ValueError, match=message) as error:
        loading.fill_tensors(saved, {"item": torch.zeros(4, 3)})
    return str(saved) in str(error.value)


def test_what_dcp_knows_is_what_is_read(saved):
    theirs, ours = dcp.FileSystemReader(str(saved)).read_metadata(), index.read_index(saved)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data and ours.storage_data[ITEM].length > 48


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_protocol_is_read(saved, protocol):
    read = pickle.loads((saved / ".metadata").read_bytes())
    (saved / ".metadata").write_bytes(pickle.dumps(read, protocol))
    assert index.read_index(saved).state_dict_metadata == read.state_dict_metadata


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "a\0b", "x" * 256, 7, None]
)
def test_a_file_outside_the_folder_is_refused_and_not_opened(saved, path):
    (saved.parent / "secret").write_bytes((saved / "__0_0.distcp").read_bytes())
    _change(saved, lambda read: setattr(read.storage_data[ITEM], "relative_path", path))
    assert _refused(saved, "which is no file of the checkpoint's folder")


class _Size:
    """Pickles as torch.Size of anything."""

    def __init__(self, *size):
        self.size = size

    def __reduce__(self):
        return torch.Size, (self.size,)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((4, 10**14), "do not make up its shape"),
        ((2**62, 2**62), "a shape is no tuple of sizes"),
        ((-4, 3), "a shape is no tuple of sizes"),
        ((1,) * 17, "a shape is no tuple of sizes"),
        ((4, 2), "has a chunk of"),
        ((4,), "has a chunk of"),
        ((5, 3), "do not make up its shape"),
    ],
)
def test_a_shape_that_its_chunks_do_not_make_up_is_refused(saved, size, message):
    _change(saved, lambda read: setattr(read.state_dict_metadata["item"], "size", _Size(*size)))
    assert _refused(saved, message)


def test_more_elements_than_bytes_in_the_file_are_refused_before_memory_is_taken(saved):
    def change(read):
        entry = read.state_dict_metadata["item"]
        entry.size = entry.chunks[0].sizes = torch.Size([4, 10**12])

    _change(saved, change)
    for read in (loading.saved_sizes, loading.saved_keys):
        with pytest.raises(ValueError, match="without a place in a file"):
            read(saved)


@pytest.mark.parametrize(("field", "value"), [("length", 10**9), ("offset", 10**9)])
def test_a_place_behind_the_end_of_a_file_is_refused(saved, field, value):
    _change(saved, lambda read: setattr(read.storage_data[ITEM], field, value))
    assert _refused(saved, r"speaks of 1,000,00\d,\d+ bytes of __0_0.distcp, which has")


@pytest.mark.parametrize(("field", "value"), [("length", -1), ("offset", -1), ("offset", 1.5), ("length", None)])
def test_a_place_that_is_none_is_refused(saved, field, value):
    _change(saved, lambda read: setattr(read.storage_data[ITEM], field, value))
    assert _refused(saved, "it holds the operation 'G'" if value == 1.5 else "has no place in __0_0.distcp")


def test_a_transformed_tensor_is_refused(saved):
    """DCP would unpack it while reading, whatever its size."""
    _change(saved, lambda read: setattr(read.storage_data[ITEM], "transform_descriptors", ["stream.zstd"]))
    assert _refused(saved, "transformed form")


def test_a_compressed_tensor_is_refused_before_it_is_unpacked(saved):
    """torch.load would unpack an archive that has 1000 times the size of the file."""
    path, packed = saved / "__0_0.distcp", saved.parent / "packed"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in archive.infolist():
            out.writestr(entry.filename, archive.read(entry) + bytes(10**6 if entry.filename.endswith("/0") else 0))
    path.write_bytes(packed.read_bytes())
    _change(saved, lambda read: setattr(read.storage_data[ITEM], "length", path.stat().st_size))
    assert _refused(saved, "larger unpacked than in the file")


def test_a_missing_place_is_refused(saved):
    _change(saved, lambda read: read.storage_data.clear())
    assert _refused(saved, "without a place in a file")


def test_a_bomb_of_references_takes_neither_time_nor_memory():
    """Python's pickle would hash a tuple of 2^60 leaves, and make room for 2^32 entries of its memo."""
    nested: tuple = ()
    for _ in range(60):
        nested = (nested, nested)
    as_key = b"\x80\x02}(" + pickle.dumps(nested, 2)[2:-1] + b"K\x01u."
    ((key, value),) = pickled.parse(as_key, ())
    assert value == 1 and len(key) == 2
    assert pickled.parse(b"\x80\x02Nr\xff\xff\xff\xff.", ()) is None


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
        pickled.parse(content, {"torch.Size"})


def test_an_allowed_name_cannot_be_changed():
    """BUILD on a class would set attributes of it in this process."""
    with pytest.raises(ValueError, match="changes what it did not make"):
        pickled.parse(b"\x80\x02ctorch\nSize\n}b.", {"torch.Size"})


def test_an_index_without_its_parts_is_refused(saved):
    read = pickle.loads((saved / ".metadata").read_bytes())
    for broken in (dataclasses.replace(read, storage_data=None), dataclasses.replace(read, state_dict_metadata=[])):
        (saved / ".metadata").write_bytes(pickle.dumps(broken))
        _refused(saved, "where a dict belongs")
