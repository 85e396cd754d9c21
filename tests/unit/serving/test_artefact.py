"""An artefact is whole or refused: damage of every kind is a named error, and a killed export leaves nothing behind."""

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from gpsd_dist.serving import artefact, counters
from gpsd_dist.serving.artefact import ArtefactError, drafting, make_current, open_version
from gpsd_dist.serving.drift import reference
from tests.helpers.run_folders import MANIFEST
from tests.integration.crash_points import die_at, in_child

FACTS = {
    "source": {"step": 40},
    "packages": {"torch": "2.13.0"},
    "manifest": json.loads(json.dumps(dataclasses.asdict(MANIFEST))),
    "engine": "eager",
    "tolerance": 1e-5,
    "limits": {"max_candidates": 10},
}


def write(root: pathlib.Path, note: str = "first", parts: tuple[bytes, ...] = (b"frozen",)) -> str:
    """A version whose one table has these parts; makes it current and returns its name."""
    with drafting(root) as draft:
        draft.write_json("model.json", {"note": note})
        (draft.folder / "vocab").mkdir()
        (draft.folder / "vocab/item.index.safetensors").write_bytes(b"\0" * 2000)
        blobs = [draft.add_blob(lambda path, part=part: path.write_bytes(part * 400)) for part in parts]
        table = {"dtype": "fp32", "num_rows": 1234, "width": 4, "blobs": blobs}
        version = draft.commit(**FACTS, tables={"item": table})
    make_current(root, version)
    return version


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "ctr")
    return tmp_path / "ctr"


def test_the_same_run_exported_again_at_once_is_another_version(tmp_path):
    versions = [write(tmp_path / "ctr") for _ in range(3)]
    assert len(set(versions)) == 3 and open_version(tmp_path / "ctr").version == versions[-1]


def test_the_umask_says_who_may_read_an_artefact(tmp_path):
    def write_private(path):
        path.write_bytes(b"of safetensors")
        path.chmod(0o600)

    before = os.umask(0o027)
    try:
        for _ in range(2):  # with the blob of before, which an older program may have kept private
            with drafting(tmp_path / "ctr") as draft:
                write_private(draft.folder / "tower.safetensors")
                blob = tmp_path / "ctr/blobs" / draft.add_blob(write_private)
                blob.chmod(0o600)
                draft.add_blob(write_private)
                draft.commit(**FACTS, tables={})
        counters.publish(tmp_path / "ctr", counters.Counters({"id": np.zeros(0, np.int64)}, as_of_s=1))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "ctr").rglob("*") if path.is_file()]
    assert len(files) > 6 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


def _blob(found: artefact.Artefact) -> pathlib.Path:
    (name,) = found.description.tables["item"]["blobs"]
    return found.root / "blobs" / name


def test_a_version_is_read_as_written(root):
    found = open_version(root)
    found.check_hashes()
    assert found.read_json("model.json") == {"note": "first"}
    assert found.manifest == MANIFEST
    assert _blob(found).read_bytes() == b"frozen" * 400
    assert open_version(found.folder).description == found.description
    with pytest.raises(ArtefactError, match=r"has no tower\.safetensors"):
        found.path("tower.safetensors")


def test_equal_parts_are_stored_once_and_what_no_version_uses_goes(root):
    first = open_version(root)
    with drafting(root) as draft:
        draft.add_blob(lambda path: path.write_bytes(b"frozen" * 400))
        assert draft.new_blob_bytes == 0
        draft.add_blob(lambda path: path.write_bytes(b"other"))
        assert draft.new_blob_bytes == 5
        with pytest.raises(OSError, match="another export is writing"), drafting(root):
            pass
    names = sorted(path.name for path in root.iterdir())
    assert names == [".lock", "blobs", "current.json", "versions"]  # nothing was committed
    assert len(list((root / "blobs").iterdir())) == 1
    second = write(root, "second", (b"frozen", b"new"))
    assert open_version(root).version == second != first.version
    make_current(root, first.version)  # rollback
    assert open_version(root).version == first.version
    shutil.rmtree(root / "versions" / second)
    with drafting(root):
        pass
    assert len(list((root / "blobs").iterdir())) == 1


def _flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _link(path: pathlib.Path) -> None:
    outside = path.parents[2] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


DAMAGES = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes, not"),
    "missing": (lambda path: path.unlink(), "No such file"),
    "link": (_link, "link"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "link or no file"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "link or no file"),
    "flipped": (_flip, "SHA-256 differs"),
}


@pytest.mark.parametrize("what", ["model.json", "vocab/item.index.safetensors", "blob"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_a_file_is_named(root, what, damage):
    found = open_version(root)
    path = _blob(found) if what == "blob" else found.folder / what
    break_it, message = DAMAGES[damage]
    break_it(path)
    with pytest.raises(ArtefactError, match=message) as error:
        open_version(root).check_hashes()
    assert path.name in str(error.value)


def test_a_folder_that_is_a_link_is_refused(root, tmp_path):
    (root / "blobs").rename(tmp_path / "elsewhere")
    (root / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="blobs is a link"):
        open_version(root)


@pytest.mark.parametrize("name", ["current.json", "artefact.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 40 + b"1" + b"}" * 40, b"null", b'{"version": 3}'],
)
def test_hostile_json_is_a_named_error(root, name, content):
    path = root / name if name == "current.json" else open_version(root).folder / name
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=name):
        open_version(root)


@pytest.mark.parametrize("version", ["..", "../../etc", "", "x" * 10_000, "20261130T113000Z-0123456789ab"])
def test_a_version_that_leads_elsewhere_is_refused(root, version):
    (root / "current.json").write_text(json.dumps({"version": version, "sha256": "0" * 64}))
    with pytest.raises(ArtefactError, match=r"names the version|cannot be read"):
        open_version(root)


def _committed(root: pathlib.Path, **changes) -> None:
    """Replaces fields of the description, with the hashes that belong to it: forgery, or another program."""
    found = open_version(root)
    raw = dataclasses.asdict(found.description) | changes
    content = json.dumps(raw).encode()
    digest = artefact.hashlib.sha256(content).hexdigest()
    version = found.version.rsplit("-", 1)[0] + "-" + digest[:12]
    (found.folder / "artefact.json").write_bytes(content)
    found.folder.rename(root / "versions" / version)
    (root / "current.json").write_text(json.dumps({"version": version, "sha256": digest}))


SUM = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema version 2, this program reads 1"),
        ({"schema_version": True}, "schema_version is True"),
        ({"engine": "pickle"}, "engine 'pickle'"),
        ({"engine": 3}, "engine is 3"),
        ({"tolerance": float("inf")}, "tolerance inf, expected 0 to 0.01"),
        ({"tolerance": float("nan")}, "tolerance nan"),
        ({"tolerance": -1.0}, "tolerance -1.0"),
        ({"surprise": 1}, "surprise is no option"),
        ({"files": {"../../outside": SUM}}, "wrong are file '../../outside'"),
        ({"files": {"/etc/passwd": SUM}}, "wrong are file"),
        ({"files": {"a/b/c": SUM}}, "wrong are file"),
        ({"files": {"": SUM}}, "wrong are file ''"),
        ({"files": {"model.json": {"bytes": -1, "sha256": "0" * 64}}}, "entry of 'model.json'"),
        ({"files": {"model.json": {"bytes": 1.5, "sha256": "0" * 64}}}, "entry of 'model.json'"),
        ({"files": {"model.json": {"bytes": 1}}}, "entry of 'model.json'"),
        ({"blobs": {"../current.json": 3}}, "blob '../current.json'"),
        ({"tables": {"item": {"dtype": "fp32", "num_rows": 3, "width": 4, "blobs": ["0" * 64]}}}, "table 'item'"),
        ({"tables": {"item": {"dtype": "fp32", "num_rows": 0, "width": 4, "blobs": []}}}, "table 'item'"),
        ({"manifest": {}}, "manifest: it has schema version None"),
        ({"limits": {"max_candidates": "ten"}}, "limits"),
    ],
)
def test_a_description_that_is_none_is_refused(root, changes, message):
    _committed(root, **changes)
    with pytest.raises(ArtefactError, match=message):
        open_version(root)


def test_a_large_file_is_not_read(root):
    os.truncate(root / "current.json", artefact.MAX_JSON_BYTES + 1)  # sparse
    with pytest.raises(ArtefactError, match="has more than"):
        open_version(root)


def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_version(tmp_path):
    prepared, log = tmp_path / "prepared", str(tmp_path / "operation")
    old, operations, states = write(prepared, "old"), [], []
    for point in range(1, 200):
        root = tmp_path / f"at_{point}"
        shutil.copytree(prepared, root)

        def killed(root=root, point=point):
            die_at(point, str(root), log)
            write(root, "new", (b"frozen", b"trained"))

        status = in_child(killed)
        found = open_version(root)
        found.check_hashes()
        states.append(found.read_json("model.json")["note"])
        for folder in (root / "versions").iterdir():  # whatever is visible is whole
            open_version(folder).check_hashes()
        assert in_child(lambda root=root: write(root, "next", (b"frozen", b"again"))) == 0
        assert open_version(root).read_json("model.json")["note"] == "next"
        assert not list(root.rglob(".partial*"))
        used = {blob for folder in (root / "versions").iterdir() for blob in open_version(folder).description.blobs}
        assert {path.name for path in (root / "blobs").iterdir()} == used
        assert old in {folder.name for folder in (root / "versions").iterdir()}
        shutil.rmtree(root)
        if status == 0:
            break
        assert status == -9
        operations.append(pathlib.Path(log).read_text())
    assert states == sorted(states, key=lambda state: state == "new") and set(states) == {"old", "new"}
    assert {operation.split(" ")[0] for operation in operations} >= {"open", "fsync", "os.mkdir", "os.rename"}
    assert len(operations) > 20, operations


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path):
    kept = tmp_path / "models/blobs/weights.bin"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"not ours")
    with pytest.raises(OSError, match="is no artefact"):
        write(tmp_path / "models")
    assert [path for path in (tmp_path / "models").rglob("*") if path.is_file()] == [kept]
    with pytest.raises(OSError, match="is a file"):
        write(kept)


def test_a_path_in_place_of_a_version_leaves_the_artefact_as_it_is(root):
    found = open_version(root)
    for given in (f"{found.version}/", str(found.folder), f"../../{root.name}/versions/{found.version}"):
        with pytest.raises(ArtefactError, match="is no name of a version"):
            make_current(root, given)
    assert open_version(root) == found


def test_an_export_that_comes_second_leaves_the_draft_of_the_first(tmp_path):
    with drafting(tmp_path / "ctr") as draft:
        draft.write_json("model.json", {})
        blob = draft.add_blob(lambda path: path.write_bytes(b"part"))
        with pytest.raises(OSError, match="another export is writing"), drafting(tmp_path / "ctr"):
            pass
        assert (draft.folder / "model.json").is_file() and (draft.root / "blobs" / blob).is_file()


def test_means_that_are_no_finite_number_are_left_out():
    read = {"a": 1, "b": 10**400, "c": float("nan"), "d": float("-inf"), "e": "x", "f": -0.5}
    assert reference({"means": read}) == {"a": 1.0, "f": -0.5}
    assert reference({"means": [1]}) == reference({}) == {}
