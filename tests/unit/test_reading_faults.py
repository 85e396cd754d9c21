""" "Cannot be read now" is not "damaged": an error that passes is injected at every call that reads a file of ours."""

import contextlib
import errno
import functools
import os
import pathlib
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp

from data_pipeline import raw_files, text_files, validate
from gpsd_dist import schema
from gpsd_dist.checkpoint import files, index, integrity, loading, state, storage
from gpsd_dist.data import data_versions
from gpsd_dist.data.parquet_dataset import ParquetSplit
from gpsd_dist.disk import reading
from gpsd_dist.disk.reading import NotReadableNow
from gpsd_dist.disk.text import say_error
from gpsd_dist.index import build as index_build
from gpsd_dist.metrics import scores
from gpsd_dist.predict.split import raw_item_ids
from gpsd_dist.scaling import runs
from gpsd_dist.serving import artefact, request_files, tables, two_part
from gpsd_dist.serving.reload import Versions
from tests.helpers.synthetic import write_dataset
from tests.unit.checkpoint.folders import add
from tests.unit.data.parquet_files import write_split

ERRNOS = (errno.ESTALE, errno.EAGAIN, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ETIMEDOUT, errno.ECONNRESET)


class Faults:
    """Fails the opening of files whose path holds `part`, `left` times more."""

    part, number, left = "", 0, 0

    def hit(self, path: object) -> None:
        if self.left and self.part in str(path):
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))


FAULTS = Faults()
sys.addaudithook(lambda event, details: FAULTS.hit(details[0]) if event == "open" and FAULTS.left else None)


def _opened(real, path, *arguments, **options):
    FAULTS.hit(path)
    return real(path, *arguments, **options)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """Arrow and safetensors open files in C++ and Rust, unseen by hooks of Python: the calls are wrapped."""
    monkeypatch.setattr(reading, "WAITS_S", (0.0, 0.0, 0.0))
    for owner, name in ((pq, "ParquetFile"), (pq, "read_table"), (tables, "safe_open")):
        monkeypatch.setattr(owner, name, functools.partial(_opened, getattr(owner, name)))
    yield
    FAULTS.left = 0


@contextlib.contextmanager
def failing(part: str, number: int, times: int):
    FAULTS.part, FAULTS.number, FAULTS.left = part, number, times
    yield
    FAULTS.left = 0


def _checkpoint(folder):
    return add(folder, 3, time_s=5.0)


def _saved(folder):
    dcp.save({"dense": {"w": torch.arange(4.0)}}, storage_writer=files.Writer(folder / "saved"), no_dist=True)
    return folder / "saved"


def _loaded(checkpoint):
    loading.fill_tensors(checkpoint, {"dense": {"w": torch.zeros(4)}})


def _json(folder):
    (folder / "a.json").write_text('{"a": {"b": 1}}')
    return folder / "a.json"


def _version(folder):
    (folder / "versions" / "0001-00000001").mkdir(parents=True)
    (folder / "current.json").write_text('{"version": "0001-00000001", "published": ["0001-00000001"]}')
    return folder


def _scores(folder):
    pq.write_table(pa.table([[] for _ in scores.SCHEMA], schema=scores.SCHEMA), folder / "scores.parquet")
    return folder / "scores.parquet"


def _split(folder):
    manifest = write_split(folder)
    schema.write_manifest(manifest, folder)
    return folder, manifest


def _decoded_group(made):
    split = ParquetSplit(*made, "pretrain")
    split.close()
    split.read_group(0)


def _dataset(folder):
    return folder, write_dataset(folder, seed=0, num_rows=4, max_history_length=3)


def _csv(folder):
    (folder / "raw.csv").write_text("a,b\n1,2\n")
    return folder / "raw.csv"


def _batches(path):
    return list(text_files.TextFile(path, text_files.TextStyle(",")).batches(["a"]))


def _parquet(folder):
    pq.write_table(pa.table({"a": [1]}), folder / "raw.parquet")
    return folder / "raw.parquet"


def _items(folder):
    pq.write_table(pa.table({"item_id": ["a"]}), folder / "items.parquet")
    return folder / "items.parquet"


def _graph(folder):
    pytest.importorskip("onnxruntime")
    (folder / "encode.onnx").write_bytes(b"no graph")
    return folder / "encode.onnx"


def _tensors(folder):
    tables.write_part(torch.zeros(2, 4), "fp32", folder / "part.safetensors")
    return folder / "part.safetensors"


READS = {
    "json of a checkpoint": (_json, storage.read_json, "a.json"),
    "checksums": (_checkpoint, integrity.read_checksums, "checksums.json"),
    "run state": (_checkpoint, lambda folder: storage.read_json(folder / "run_state.json"), "run_state.json"),
    "verified files": (_checkpoint, integrity.check, "distcp"),
    "index": (_saved, index.read_index, "index.json"),
    "tensors": (_saved, _loaded, "distcp"),
    "tensors of DCP": (_saved, _loaded, "index.json"),
    "current version": (_version, data_versions.current, "current.json"),
    "manifest": (_split, lambda made: schema.read_manifest(made[0]), "manifest.json"),
    "footers": (_split, lambda made: ParquetSplit(*made, "pretrain"), "part-00001.parquet"),
    "row group": (_split, _decoded_group, "part-00000.parquet"),
    "scores": (_scores, scores.read_scores, "scores.parquet"),
    "raw ids": (_dataset, lambda made: raw_item_ids(*made), "item.parquet"),
    "result of a trial": (_json, runs.read_result, "a.json"),
    "json of an artefact": (_json, artefact.read_json, "a.json"),
    "hash of an artefact": (_json, artefact.sum_of, "a.json"),
}
STREAMS = {  # read once from the start to the end; the command is run again
    "raw text": (_csv, _batches, "raw.csv"),
    "raw Parquet": (_parquet, lambda path: list(raw_files.ParquetFile(path).batches(["a"])), "raw.parquet"),
    "validated Parquet": (_parquet, lambda path: validate._open(path, None), "raw.parquet"),
    "tables of an artefact": (_tensors, tables.read_tensors, "part.safetensors"),
    "graph of an artefact": (_graph, lambda path: two_part._session(path, ()), "encode.onnx"),
    "items of an index": (_items, index_build._item_ids, "items.parquet"),
    "requests": (_parquet, lambda path: next(request_files.read(None, path)), "raw.parquet"),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_what_passes_is_read_again(tmp_path, caplog, name, number):
    make, read, part = READS[name]
    made = make(tmp_path)
    with failing(part, number, times=1):
        read(made)
        assert not FAULTS.left
    assert "cannot be read now" in caplog.text and os.strerror(number) in caplog.text and "retry " in caplog.text


@pytest.mark.parametrize("name", READS | STREAMS)
@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_what_does_not_pass_is_status_74_and_no_damage(tmp_path, capsys, name, number):
    make, read, part = (READS | STREAMS)[name]
    made = make(tmp_path)
    with failing(part, number, times=99), pytest.raises(OSError) as raised:
        read(made)
    assert isinstance(raised.value, NotReadableNow) and not isinstance(raised.value, ValueError)
    assert say_error(raised.value) == 74
    printed = capsys.readouterr().err
    assert os.strerror(number) in printed and ("no damage" in printed or "cannot verify" in printed)


@pytest.mark.parametrize("name", ["footers", "row group", "scores", "raw ids"])
def test_the_number_of_an_error_that_arrow_puts_into_its_text_is_found(tmp_path, monkeypatch, name):
    """As a read of pyarrow 26 fails in the middle of a file: the exception has no errno."""
    make, read, _ = READS[name]
    made, left = make(tmp_path), [True]

    def fail(*_, **__):
        if left:
            left.pop()
            raise OSError("Error reading bytes from file. Detail: [errno 116] Stale file handle")

    monkeypatch.setattr(FAULTS, "hit", fail, raising=False)
    read(made)
    assert not left


def test_what_the_bytes_say_is_damage_all_the_same(tmp_path):
    folder, manifest = _split(tmp_path)
    path = folder / manifest.splits[0].files[0]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="truncated or not a Parquet file"):
        ParquetSplit(folder, manifest, "pretrain")
    assert say_error(ValueError("x")) == 2 and say_error(FileNotFoundError(errno.ENOENT, "x")) == 2


def test_too_little_memory_and_no_more_threads_are_no_damage():
    for error in (MemoryError(), pa.ArrowMemoryError("malloc"), RuntimeError("can't start new thread")):
        assert reading.why_passing(error)
    assert not reading.why_passing(RuntimeError("x")) and not reading.why_passing(KeyError("errno 5"))


def test_a_version_that_cannot_be_read_now_is_not_passed_over(tmp_path):
    """An older version must not be taken for it."""
    folder = _version(tmp_path)
    write_dataset(folder / "versions" / "0001-00000001", seed=0, num_rows=4, max_history_length=3)
    wanted = data_versions.Wanted(lambda manifest: True, "0001-00000001", "fits")
    with failing("manifest.json", errno.EIO, times=99), pytest.raises(NotReadableNow):
        data_versions.find(folder, wanted)


def test_a_checkpoint_whose_state_cannot_be_read_is_not_passed_over(tmp_path):
    folder = add(tmp_path, 3)
    with failing("run_state.json", errno.EIO, times=99), pytest.raises(NotReadableNow):
        state.read_state(folder)


def test_a_server_looks_at_a_pointer_again_that_it_could_not_read(tmp_path):
    (tmp_path / "current.json").write_text("one")
    loaded = []
    versions = Versions(
        tmp_path,
        lambda root: loaded.append((root / "current.json").read_text()) or type("Scorer", (), {"version": "v"})(),
        lambda *_: None,
        contextlib.nullcontext(),
    )
    (tmp_path / "current.json").write_text("two")
    with failing("current.json", errno.ESTALE, times=4):
        versions.poll()
    assert loaded == ["one"]
    versions.poll()
    assert loaded == ["one", "two"]


@pytest.mark.parametrize("error", [OSError("[errno 5] Input/output error"), MemoryError(), NotReadableNow("x")])
def test_a_server_tries_a_version_again_that_it_could_not_read(tmp_path, error):
    """Whatever part of it failed, and however that was reported: only what is damaged waits for another pointer."""
    (tmp_path / "current.json").write_text("one")
    failures = []

    def load(root):
        if failures:
            raise failures.pop()
        return type("Scorer", (), {"version": (root / "current.json").read_text()})()

    versions = Versions(tmp_path, load, lambda *_: None, contextlib.nullcontext())
    (tmp_path / "current.json").write_text("two")
    failures.append(error)
    versions.poll()
    assert versions.scorer().version == "one"
    versions.poll()
    assert versions.scorer().version == "two"
    (tmp_path / "current.json").write_text("three")
    failures.append(ValueError("damaged"))
    versions.poll()
    versions.poll()
    assert versions.scorer().version == "two"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_pipe_in_place_of_a_file_is_an_error_at_once(tmp_path, kind):
    path = pathlib.Path(tmp_path, "a.json")
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(OSError, match=f"a.json is a {kind}, expected a plain file"):
        storage.read_json(path)
