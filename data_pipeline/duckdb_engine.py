"""Runs the pipeline's queries by DuckDB: one process, all cores, spilling to disk beyond its memory limit."""

import pathlib
import tempfile
import typing

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from data_pipeline import progress

# Ibis binds a built-in function to one result type, and this one returns two: so it needs a second name.
_SETUP = "CREATE MACRO json_extract_strings(line, path) AS json_extract_string(line, path)"


class DuckDB:
    """Does what the pipeline asks of an engine beyond Ibis expressions; `spark_engine.Spark` has the same methods."""

    errors = (duckdb.Error,)

    def __init__(self, scratch_dir: pathlib.Path, memory_limit: str, threads: int | None, *, saves_space: bool):
        # DuckDB takes a question mark in a path, links resolved, for the beginning of options.
        self._aside = tempfile.TemporaryDirectory() if "?" in str(scratch_dir.resolve()) else None
        if self._aside is not None:
            progress.say(f"scratch data lie in {self._aside.name}, because DuckDB cannot work in {scratch_dir}")
            scratch_dir = pathlib.Path(self._aside.name)
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
        if not saves_space:
            # Choosing a compression for every column of every stored table takes a fifth of the CPU time of a build.
            self.con.raw_sql("SET force_compression = 'uncompressed'")
        self.con.raw_sql(_SETUP)
        # No query of the pipeline opens a file: whatever a name or a value looks like, DuckDB cannot follow it.
        self.con.raw_sql("SET enable_external_access = false")

    def create(self, name: str, table: ir.Table) -> ir.Table:
        """Runs the query and stores the result under a new name."""
        # Not by Ibis's create_table, which copies the query's syntax tree: an eighth of the CPU time of a small build.
        self.con._run_pre_execute_hooks(table)  # registers memtables
        columns = table.schema().to_sqlglot_column_defs("duckdb")
        names = ", ".join(column.this.sql("duckdb") for column in columns)
        self.con.raw_sql(f'CREATE TABLE "{name}" ({", ".join(column.sql("duckdb") for column in columns)})')
        self.con.raw_sql(f'INSERT INTO "{name}" ({names}) {self.con.compile(table)}')
        return self.con.table(name)

    def count(self, name: str) -> int:
        """Counts the rows of a stored table."""
        # Not by Ibis: a small build has two dozen counts, and compiling each takes longer than counting.
        [(count,)] = self.con.raw_sql(f'SELECT count(*) FROM "{name}"').fetchall()
        return count

    def append(self, name: str, table: ir.Table) -> None:
        """Adds the query's rows to a stored table of the same columns."""
        self.con.raw_sql(f'INSERT INTO "{name}" {self.con.compile(table)}')

    def drop(self, name: str) -> None:
        """Removes a stored table."""
        self.con.raw_sql(f'DROP TABLE "{name}"')  # Ibis 12 would write DROP TABLE TABLE with this sqlglot

    def from_stream(self, name: str, schema: pa.Schema, batches: typing.Iterator[pa.RecordBatch]) -> ir.Table:
        """Stores a stream of Arrow batches."""
        view = f"{name}_stream"
        self.con.con.register(view, pa.RecordBatchReader.from_batches(schema, batches))
        try:
            self.con.raw_sql(f'CREATE TABLE "{name}" AS SELECT * FROM "{view}"')
        finally:
            self.con.con.unregister(view)
        return self.con.table(name)

    def batches(self, table: ir.Table, num_rows: int) -> typing.Iterator[pa.RecordBatch]:
        """Streams the query's result in batches of about `num_rows` rows."""
        # Ibis 12's own to_pyarrow_batches calls fetch_record_batch, which DuckDB 2.0 no longer has.
        cursor = self.con.con.cursor()
        try:
            yield from cursor.sql(self.con.compile(table)).to_arrow_reader(num_rows)
        finally:
            cursor.close()

    def close(self) -> None:
        """Closes the connection, so that the scratch folder can be removed."""
        self.con.disconnect()
        if self._aside is not None:
            self._aside.cleanup()
