"""Builds tiny raw folders and reads the result back with raw ids instead of indices."""

import pathlib

import pyarrow.parquet as pq
import pytest

from data_pipeline import build, command_line, engine, sources
from gpsd_dist import schema
from gpsd_dist.data import data_versions


class Prepared:
    """A prepared data set whose rows hold raw ids: PAD is index 0, UNKNOWN is index 1."""

    def __init__(self, path: pathlib.Path):
        self.path = path = data_versions.current(path)
        self.manifest = schema.read_manifest(path)
        self.words = {}
        for table in self.manifest.tables:
            vocab = pq.read_table(path / "vocab" / f"{table.name}.parquet").to_pydict()
            self.words[table.name] = {0: "PAD", 1: "UNKNOWN"} | dict(zip(vocab["index"], vocab["raw_id"]))

    def rows(self, split: str) -> dict[tuple, dict]:
        """{(user_id, request_time_s): columns}; of `pretrain`, {(user_id,): columns}."""
        rows = {}
        for file in self.manifest.split(split).files:
            for row in pq.read_table(self.path / file).to_pylist():
                key = (row["user_id"],) if split == "pretrain" else (row["user_id"], row["request_time_s"])
                assert key not in rows, key
                rows[key] = {name: self._decode(name, value) for name, value in row.items()}
        return rows

    def _decode(self, column: str, value):
        place, _, name = column.partition(".")
        if place not in schema.PLACES or name == "time_s":
            return value
        feature = self.manifest.feature(name)
        if feature.kind == "numerical":
            return value
        words = self.words[feature.table]

        def look_up(entry):
            return [look_up(part) for part in entry] if isinstance(entry, list) else words[entry]

        return look_up(value)


@pytest.fixture
def prepare(tmp_path):
    """prepare(source, *arguments) runs the command on tmp_path/raw and returns the Prepared data."""

    def run(source: str, *arguments: str) -> Prepared:
        argv = ["--source", source, "--raw_dir", str(tmp_path / "raw"), "--out_dir", str(tmp_path / "out"), *arguments]
        build.build(command_line.parse(argv), "test")
        return Prepared(tmp_path / "out")

    return run


@pytest.fixture
def read_log(tmp_path):
    """read_log(source, *arguments) runs only find_files and read on tmp_path/raw: quick, for the error paths."""
    opened = []

    def run(source: str, *arguments: str):
        argv = ["--source", source, "--raw_dir", str(tmp_path / "raw"), "--out_dir", str(tmp_path / "out"), *arguments]
        module = sources.load(source)
        options = sources.complete(module, command_line.parse(argv))
        files = module.find_files(options)
        scratch = tmp_path / f"scratch{len(opened)}"
        scratch.mkdir()
        opened.append(engine.Engine("duckdb", scratch))
        return module.read(opened[-1], files, options)

    yield run
    for running in opened:
        running.close()


@pytest.fixture
def raw(tmp_path):
    """raw(name, text) writes a file of the raw folder."""
    (tmp_path / "raw").mkdir()

    def write(name: str, content: str | bytes) -> pathlib.Path:
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
