"""Hostile data sets: a manifest or Parquet files that break the contract are one error that names them, or harmless."""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import pathlib
import shutil
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import strategies as st

from data_pipeline import append, command_line, fresh, previous
from gpsd_dist import schema
from gpsd_dist.assembly import looked_up_tables
from gpsd_dist.checkpoint import growth
from gpsd_dist.config import RunConfig, TablesConfig
from gpsd_dist.data.collate import Collate
from gpsd_dist.data.loader import Loader
from gpsd_dist.evaluate import main
from gpsd_dist.tables.collections import Tables
from tests.fuzz.properties import assert_one_error_line, clean_or_one_error, fuzz
from tests.fuzz.test_checkpoints import CHANGES, HOSTILE, _place
from tests.helpers.synthetic import write_dataset

ROWS = 12


@functools.cache
def _kept_until_exit() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fuzz_data_")


@functools.cache
def _whole() -> pathlib.Path:
    root = pathlib.Path(_kept_until_exit().name)
    write_dataset(root, seed=0, num_rows=ROWS, num_files=1, row_group_rows=5, max_history_length=6)
    return root


@contextlib.contextmanager
def _copy():
    """A data folder; beside it lies another one, which no manifest may reach."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as place:
        root = pathlib.Path(place) / "data"
        shutil.copytree(_whole(), root)
        (pathlib.Path(place) / "outside").symlink_to(_whole())
        yield root


def _read(root: pathlib.Path) -> int:
    """Manifest, tables without memory, and all batches of two splits. Returns the number of requests."""
    manifest = schema.read_manifest(root)
    run = RunConfig("pretrain", str(root), "out", tables=TablesConfig(small_table_max_rows=4))
    Tables(looked_up_tables(run, manifest), (), run.tables, torch.device("meta"))
    total = 0
    for split, with_candidates in (("pretrain", False), ("train", True)):
        sharded = ("item",)
        per = None if with_candidates else "group"
        collate = Collate(manifest, sharded, 5, with_candidates, per, num_negatives=3)
        loader = Loader(
            root,
            manifest,
            split,
            make_batch=collate,
            columns=collate.columns(),
            num_data_shards=2,
            global_batch_tokens=20,
            window_rows=4,
        )
        with contextlib.closing(loader):
            for (batch,) in loader:
                total += batch.packing.num_requests
    return total


def test_the_whole_one_is_read():
    assert _read(_whole()) == 2 * ROWS


PATHS = st.sampled_from(
    ["../outside/train/part-00000.parquet", "/etc/passwd", "train/../../outside/items.parquet", "train", "", "\0"]
)


@fuzz(
    80,
    changes=st.lists(
        st.tuples(st.integers(0, 500), HOSTILE | PATHS | PATHS.map(lambda path: [path])), min_size=1, max_size=3
    ),
)
def test_any_manifest(changes):
    """Values of the manifest that are no values."""
    with _copy() as root:
        path = root / "manifest.json"
        document = json.loads(path.read_text())
        for number, value in changes:
            container, key = _place(document, number)
            container[key] = copy.deepcopy(value)
        path.write_text(json.dumps(document))
        with clean_or_one_error():
            _read(root)


STEP = {"parent": "day1", "parent_manifest_sha256": "", "fingerprint": "", "sources": [], "new_rows": {"item": 1}}


GIVEN = command_line.parse(["--source", "generic", "--raw_dir", "raw", "--out_dir", "out"])


@fuzz(60, changes=CHANGES, name=st.sampled_from(["chain", "chain", fresh.BOUNDARIES, "raw_dir", "recorded"]))
def test_any_chain_of_parents(changes, name):
    """What the trainer and a daily build read of the data sets that this one grew from."""
    with _copy() as root:
        path = root / "manifest.json"
        document = json.loads(path.read_text())
        options = {fresh.BOUNDARIES: [1, 2, 3], "chain": [STEP | {"tables": document["tables"]}] * 2, "raw_dir": "raw"}
        options["recorded"] = GIVEN.recorded() | {"schema": "schema.toml"}
        hostile = {name: copy.deepcopy(options[name])}
        for number, value in changes:
            container, key = _place(hostile, number)
            container[key] = copy.deepcopy(value)
        changed = hostile.get(name)
        document["options"] = options | (
            changed if name == "recorded" and isinstance(changed, dict) else {name: changed}
        )
        path.write_text(json.dumps(document))
        with clean_or_one_error():
            manifest = schema.read_manifest(root)
            growth.ancestors(manifest)
            found = previous.Previous(root, manifest, "")
            append.bounds_of(found)
            append.is_current(dataclasses.replace(GIVEN, out_dir=root), found, "")
            previous.as_built(dataclasses.replace(GIVEN, source=manifest.source), found)


@fuzz(
    25,
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), max_size=4),
    cut=st.none() | st.integers(0, 2**20),
    name=st.sampled_from(["train", "pretrain"]),
)
def test_flipped_and_cut_parquet(flips, cut, name):
    with _copy() as root:
        path = root / name / "part-00000.parquet"
        content = bytearray(path.read_bytes())
        for place, mask in flips:
            content[-1 - place % min(len(content), 4000)] ^= mask  # the footer and the last pages
        content = content[: cut % len(content)] if cut is not None else content
        path.write_bytes(content)
        with clean_or_one_error():
            _read(root)


INTEGERS = st.sampled_from([None, -(2**63), -1, 0, 1, 2, 7, 2**31, 2**63 - 1])
FLOATS = st.sampled_from([None, float("nan"), float("inf"), -float("inf"), 0.0, 1.0, 0.5, -1.0, 2.0, 3.4e38, 1e-45])
TYPES = [
    pa.string(),
    pa.int32(),
    pa.int64(),
    pa.float64(),
    pa.bool_(),
    pa.list_(pa.int32()),
    pa.list_(pa.string()),
    pa.null(),
    pa.list_(pa.list_(pa.list_(pa.int64()))),
    pa.struct([("a", pa.int64())]),
    pa.large_list(pa.int64()),
]


def _values_of(kind: pa.DataType) -> st.SearchStrategy:
    if pa.types.is_list(kind):
        return st.none() | st.lists(_values_of(kind.value_type), max_size=8)
    return (
        FLOATS
        if pa.types.is_floating(kind)
        else INTEGERS
        if pa.types.is_integer(kind)
        else st.none() | st.text(max_size=3)
    )


@st.composite
def _columns(draw) -> tuple[str, str, pa.Array | None]:
    """(split, column, its hostile values); None: the column is missing."""
    split = draw(st.sampled_from(["train", "pretrain"]))
    table = pq.read_table(_whole() / split / "part-00000.parquet")
    name = draw(st.sampled_from(table.column_names))
    how = draw(st.sampled_from(["values", "values", "values", "type", "missing", "rolled"]))
    column = table[name].combine_chunks()
    if how == "missing":
        return split, name, None
    if how == "type":
        return split, name, pa.nulls(ROWS, draw(st.sampled_from(TYPES)))
    if how == "rolled":  # lists of other lengths than those of the other columns
        return split, name, column.take(pa.array(np.roll(np.arange(ROWS), draw(st.integers(1, ROWS - 1)))))
    values = column.to_pylist()
    for row, value in draw(
        st.lists(st.tuples(st.integers(0, ROWS - 1), _values_of(column.type)), min_size=1, max_size=4)
    ):
        values[row] = value
    try:
        return split, name, pa.array(values, column.type)
    except (pa.ArrowException, OverflowError):  # a value that this type does not have
        return split, name, column


@fuzz(40, changes=st.lists(_columns(), min_size=1, max_size=2))
def test_any_column(changes):
    """Nulls, wrong types, lists of other lengths, indices out of range, NaN and inf, labels beside 0 and 1."""
    with _copy() as root:
        for split, name, column in changes:
            path = root / split / "part-00000.parquet"
            table = pq.read_table(path)
            if name not in table.column_names:
                continue
            index = table.column_names.index(name)
            table = table.remove_column(index) if column is None else table.set_column(index, name, column)
            pq.write_table(table, path, row_group_size=5)
        with clean_or_one_error() as errors:
            requests = _read(root)
        assert errors or requests == 2 * ROWS


NAMES = st.sampled_from(["popularity", "rates", "next_item_popularity"])


@fuzz(30, name=NAMES, columns=st.lists(_columns(), max_size=1), changes=CHANGES | st.just([]))
def test_commands_on_any_data(name, columns, changes):
    """Exit status 0, or 2 with one line."""
    with _copy() as root:
        for split, column, values in columns:
            path = root / split / "part-00000.parquet"
            table = pq.read_table(path)
            index = table.column_names.index(column)
            table = table.remove_column(index) if values is None else table.set_column(index, column, values)
            pq.write_table(table, path, row_group_size=5)
        document = json.loads((root / "manifest.json").read_text())
        for number, value in changes:
            container, key = _place(document, number)
            container[key] = copy.deepcopy(value)
        (root / "manifest.json").write_text(json.dumps(document))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["--baseline", name, "--data", str(root), "--split", "valid"])
        if status:
            assert_one_error_line(status, err.getvalue())


@pytest.mark.parametrize("what", ["num_rows", "num_history_tokens", "num_candidates"])
@pytest.mark.parametrize("count", [10**15, 2**63, 10**400, -1])
def test_a_claimed_count_allocates_nothing(what, count, capsys):
    with _copy() as root:
        document = json.loads((root / "manifest.json").read_text())
        document["splits"][1][what] = count
        (root / "manifest.json").write_text(json.dumps(document))
        if what == "num_candidates" and count == 10**15:  # a note, nothing is sized by it
            return
        with clean_or_one_error() as errors:
            _read(root)
        assert errors


def test_a_shard_outside_the_folder_is_refused_however_it_is_named(capsys):
    with _copy() as root:
        document = json.loads((root / "manifest.json").read_text())
        inside = document["splits"][1]["files"][0]
        for name in ("../outside/train/part-00000.parquet", str(_whole() / "train/part-00000.parquet")):
            document["splits"][1]["files"] = [name]
            (root / "manifest.json").write_text(json.dumps(document))
            with pytest.raises(ValueError, match="which is no file in the data folder"):
                _read(root)
        document["splits"][1]["files"] = [inside]
        (root / "manifest.json").write_text(json.dumps(document))
        (root / inside).unlink()
        (root / inside).symlink_to(_whole() / inside)
        with pytest.raises(ValueError, match="is a link that leads out of"):
            _read(root)
        (root / "train").rename(root / "elsewhere")  # a link inside of the folder is one
        (root / "elsewhere/part-00000.parquet").unlink()
        shutil.copy(_whole() / inside, root / "elsewhere/part-00000.parquet")
        (root / "train").symlink_to(root / "elsewhere")
        assert _read(root) == 2 * ROWS


def test_a_command_says_it_in_one_line(capsys):
    with _copy() as root:
        (root / "train/part-00000.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
        status = main(["--baseline", "popularity", "--data", str(root), "--split", "valid"])
        assert_one_error_line(status, capsys.readouterr().err)
