"""The query engine behind the pipeline: one Ibis connection with a scratch folder and progress by step."""

import contextlib
import pathlib
import tempfile
import time
import typing

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from data_pipeline import progress

ENGINES = ("duckdb",)


READ_ERRORS = (duckdb.Error,)  # what the engine raises for a file that it cannot parse


class Engine:
    """One Ibis connection. Tables that are used more than once are materialised in its scratch database."""

    def __init__(self, name: str, scratch_dir: pathlib.Path, memory_limit: str = "4GB", threads: int | None = None):
        """Opens the engine; tables and spilled data go to `scratch_dir`, which must exist."""
        if name not in ENGINES:
            raise ValueError(f"--engine {name!r} is not one of {ENGINES}")
        self.name = name
        config: dict[str, typing.Any] = {"memory_limit": memory_limit, "temp_directory": str(scratch_dir / "spill")}
        if threads is not None:
            config["threads"] = threads
        try:
            self.con = ibis.duckdb.connect(scratch_dir / "scratch.duckdb", **config)
        except duckdb.Error as error:
            raise ValueError(
                f"the engine cannot start with --memory_limit {memory_limit} and --threads {threads} "
                f"({str(error).splitlines()[0]}); give a size such as 4GB, and at least 1 thread"
            ) from error
        self.con.raw_sql("SET enable_progress_bar = false")

    def materialise(self, name: str, table: ir.Table) -> ir.Table:
        """Runs the query once and returns the stored result; `name` must be new."""
        started = time.monotonic()
        stored = self.con.create_table(name, table)
        progress.say(f"  {name:<24} {stored.count().execute():>12,} rows  {time.monotonic() - started:6.1f} s")
        return stored

    def batches(self, table: ir.Table, num_rows: int) -> typing.Iterator[pa.RecordBatch]:
        """Streams the query's result in batches of about `num_rows` rows."""
        # Ibis 12's own to_pyarrow_batches calls fetch_record_batch, which DuckDB 2.0 no longer has
        cursor = self.con.con.cursor()
        try:
            yield from cursor.sql(self.con.compile(table)).to_arrow_reader(num_rows)
        finally:
            cursor.close()

    def close(self) -> None:
        """Closes the connection, so that the scratch folder can be removed."""
        self.con.disconnect()


@contextlib.contextmanager
def scratch(name: str, parent: pathlib.Path, memory_limit: str, threads: int | None) -> typing.Iterator[Engine]:
    """An engine with a scratch folder inside `parent` that is removed at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pipeline-scratch-", dir=parent) as folder:
        engine = Engine(name, pathlib.Path(folder), memory_limit, threads)
        try:
            yield engine
        finally:
            engine.close()
