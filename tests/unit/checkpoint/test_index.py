"""An index that does not describe its files is refused before anything is read; DCP's tools read our checkpoints."""

import json
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from gpsd_dist.checkpoint import files, index, loading

TENSORS = {"item": torch.arange(12.0).reshape(4, 3), "step": torch.tensor(7), "w": torch.ones(5, dtype=torch.bfloat16)}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with the tensor `item` [4, 3] and two more."""
    dcp.save(TENSORS, storage_writer=files.Writer(tmp_path / "saved"), no_dist=True)
    return tmp_path / "saved"


def _change(saved, change) -> None:
    """Rewrites the index."""
    document = json.loads((saved / "index.json").read_text())
    change(document)
    (saved / "index.json").write_text(json.dumps(document))


def _change_chunk(saved, **values) -> None:
    _change(saved, lambda document: document["tensors"]["item"]["chunks"][0].update(values))


def _refused(saved, message: str) -> bool:
    """Whether the error names the checkpoint; it must be one."""
    with pytest.raises(ValueError, match=message) as error:
        loading.fill_tensors(saved, {"item": torch.zeros(4, 3)})
    return str(saved) in str(error.value)


def test_both_forms_of_the_index_say_what_dcp_knows(saved):
    theirs = dcp.FileSystemReader(str(saved)).read_metadata()
    for name in ("index.json", ".metadata"):
        ours = index.read_index(saved)
        assert ours.state_dict_metadata == theirs.state_dict_metadata, name
        assert ours.storage_data == theirs.storage_data and len(ours.storage_data) == len(TENSORS), name
        (saved / name).unlink()


def test_the_json_is_read_and_the_pickle_is_not(saved):
    (saved / ".metadata").write_bytes(b"broken")
    loaded = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    loading.fill_tensors(saved, loaded)
    assert all(torch.equal(loaded[name], value) for name, value in TENSORS.items())


def test_tools_of_dcp_read_our_checkpoints(saved, tmp_path):
    dcp_to_torch_save(saved, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert whole.keys() == TENSORS.keys()
    assert all(torch.equal(whole[name], value) for name, value in TENSORS.items())


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "a\0b", "x" * 256, 7, None, [[]]]
)
def test_a_file_outside_the_folder_is_refused_and_not_opened(saved, path):
    (saved.parent / "secret").write_bytes((saved / "__0_0.distcp").read_bytes())
    _change_chunk(saved, file=path)
    assert _refused(saved, "which is no file of the checkpoint's folder")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ([4, 10**14], "do not make up its shape"),
        ([2**62, 2**62], "a shape is no list of at most 16 sizes"),
        ([-4, 3], "a shape is no list"),
        ([4.0, 3], "a shape is no list"),
        ([True, 3], "a shape is no list"),
        ("43", "a shape is no list"),
        ([1] * 17, "a shape is no list"),
        ([4, 2], "has a chunk of"),
        ([4], "has a chunk of"),
        ([5, 3], "do not make up its shape"),
    ],
)
def test_a_shape_that_its_chunks_do_not_make_up_is_refused(saved, size, message):
    _change(saved, lambda document: document["tensors"]["item"].update(size=size))
    assert _refused(saved, message)


def test_more_elements_than_bytes_in_the_file_are_refused_before_memory_is_taken(saved):
    def change(document):
        entry = document["tensors"]["item"]
        entry["size"] = entry["chunks"][0]["sizes"] = [4, 10**12]

    _change(saved, change)
    for read in (loading.saved_sizes, loading.saved_keys):
        with pytest.raises(ValueError, match=r"has a chunk of 16,000,000,000,000 bytes, for which __0_0.distcp has"):
            read(saved)


@pytest.mark.parametrize(("field", "value"), [("num_bytes", 10**9), ("first_byte", 10**9)])
def test_a_place_behind_the_end_of_a_file_is_refused(saved, field, value):
    _change_chunk(saved, **{field: value})
    assert _refused(saved, r"speaks of 1,000,00\d,\d+ bytes of __0_0.distcp, which has")


@pytest.mark.parametrize("field", ["num_bytes", "first_byte"])
@pytest.mark.parametrize("value", [-1, 1.5, None, "1", 2**62, True])
def test_a_place_that_is_none_is_refused(saved, field, value):
    _change_chunk(saved, **{field: value})
    assert _refused(saved, "has no place in __0_0.distcp")


def test_a_compressed_tensor_is_refused_before_it_is_unpacked(saved):
    """torch.load would unpack an archive that has 1000 times the size of the file."""
    path, packed = saved / "__0_0.distcp", saved.parent / "packed"
    place = index.read_index(saved).storage_data[index.MetadataIndex("item", [0, 0])]
    content = path.read_bytes()[place.offset : place.offset + place.length]
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in archive.infolist():
            out.writestr(entry.filename, archive.read(entry) + bytes(10**6 if entry.filename.endswith("/0") else 0))
    path.write_bytes(packed.read_bytes())
    _change(saved, lambda document: [document["tensors"].pop(name) for name in ("step", "w")])
    _change_chunk(saved, first_byte=0, num_bytes=path.stat().st_size)
    assert _refused(saved, "larger unpacked than in the file")


@pytest.mark.parametrize("key", ["dtype", "size", "chunks"])
def test_an_entry_without_its_parts_is_refused(saved, key):
    _change(saved, lambda document: document["tensors"]["item"].pop(key))
    assert _refused(saved, f"refused as the index of a checkpoint: KeyError '{key}'")


@pytest.mark.parametrize(("key", "value"), [("tensors", []), ("tensors", None), ("tensors", {"item": 3})])
def test_an_index_without_its_parts_is_refused(saved, key, value):
    _change(saved, lambda document: document.update({key: value}))
    assert _refused(saved, "refused as the index of a checkpoint")


def test_a_newer_index_says_so(saved):
    _change(saved, lambda document: document.update(version=2))
    assert _refused(saved, "it has version 2, this program knows 1: use a newer one")


@pytest.mark.parametrize("content", [b"", b"half", b"[]", b'{"version": 1', b'{"version": 1}', b"\xff"])
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index.json is refused as the index of a checkpoint") as error:
        index.read_index(tmp_path)
    assert str(tmp_path / "index.json") in str(error.value)
