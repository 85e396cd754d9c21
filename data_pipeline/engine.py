"""Opens the query engine of the pipeline: one Ibis connection with a scratch folder, and progress by step.

The transformations are Ibis expressions. What Ibis cannot say alike for all engines (opening files, streaming a
result) is in `duckdb_engine.DuckDB` and `spark_engine.Spark`, which have the same methods.
"""

import contextlib
import importlib.util
import pathlib
import tempfile
import time
import typing

import ibis
import ibis.expr.operations as ops
import ibis.expr.types as ir
import pyarrow as pa

from data_pipeline import duckdb_engine, progress
from data_pipeline.options import BuildOptions, EngineName

DEFAULT_MASTER = "local[*]"
SMALL_LOG_BYTES = 1 << 27  # untuned: some 17 M events in Parquet, whose stored tables take 7 GB without compression
_NO_NEWS = "An error occurred while calling"  # begins the first line of every error that Spark's Java side raises


class EngineFailed(RuntimeError):
    """The engine could not finish a query."""


class Engine:
    """Holds one Ibis connection. Tables that are used more than once are materialised in its scratch folder."""

    def __init__(
        self,
        name: EngineName,
        scratch_dir: pathlib.Path,
        memory_limit: str = "4GB",
        threads: int | None = None,
        *,
        spark_master: str | None = None,
        spark_settings: dict[str, str] | None = None,
        saves_space: bool = True,
    ):
        """Opens the engine; tables and spilled data go to `scratch_dir`, which must exist.

        `saves_space`: stored tables are compressed, which costs CPU time; of DuckDB alone.
        """
        self.name = name
        if name == "spark":
            spark_engine = _import_spark()
            self.backend = spark_engine.Spark(
                scratch_dir.resolve(), memory_limit, spark_master or DEFAULT_MASTER, spark_settings or {}
            )
        else:
            self.backend = duckdb_engine.DuckDB(scratch_dir, memory_limit, threads, saves_space=saves_space)
        self.con = self.backend.con
        self.rows_of: dict[str, int] = {}
        """Raw file -> rows that were read of it."""

    def materialise(self, name: str, table: ir.Table) -> ir.Table:
        """Runs the query once and returns the stored result; `name` must be new."""
        started = time.monotonic()
        stored = self.backend.create(name, table)
        progress.say(f"  {name:<24} {self.backend.count(name):>12,} rows  {time.monotonic() - started:6.1f} s")
        return stored

    def stored(self, name: str, table: ir.Table) -> ir.Table:
        """Materialises the query, unless it is a stored table already."""
        return table if isinstance(table.op(), ops.DatabaseTable) else self.materialise(name, table)

    def materialise_parts(self, name: str, parts: typing.Iterable[ir.Table]) -> ir.Table:
        """Runs the queries one after the other and returns their union, stored under the new `name`."""
        started = time.monotonic()
        stored = None
        for part in parts:
            if stored is None:
                stored = self.backend.create(name, part)
            else:
                self.backend.append(name, part)
        stored = self.con.table(name)
        progress.say(f"  {name:<24} {self.backend.count(name):>12,} rows  {time.monotonic() - started:6.1f} s")
        return stored

    def store(self, table: ir.Table | pa.Table) -> ir.Table:
        """Stores a query's result or an Arrow table, without a name or a line on the screen."""
        if isinstance(table, pa.Table):
            return self.store_batches(table.schema, iter(table.to_batches()))
        return self.backend.create(ibis.util.gen_name("stored"), table)

    def store_batches(self, schema: pa.Schema, batches: typing.Iterator[pa.RecordBatch]) -> ir.Table:
        """Stores a stream of Arrow batches; an error of the stream is raised as it is."""
        failures: list[Exception] = []

        def watched() -> typing.Iterator[pa.RecordBatch]:
            try:
                yield from batches
            except Exception as error:  # the engine would wrap it in one of its own
                failures.append(error)
                raise

        try:
            return self.backend.from_stream(ibis.util.gen_name("stored"), schema, watched())
        except Exception:
            if failures:
                raise failures[0] from None
            raise

    def batches(self, table: ir.Table, num_rows: int) -> typing.Iterator[pa.RecordBatch]:
        """Streams the query's result in batches of about `num_rows` rows."""
        return self.backend.batches(table, num_rows)

    def close(self) -> None:
        """Closes the connection, so that the scratch folder can be removed."""
        self.backend.close()


def _import_spark() -> typing.Any:
    """Imports `spark_engine`; ValueError where PySpark is not installed."""
    if importlib.util.find_spec("pyspark") is None:
        raise ValueError(
            "--engine spark needs PySpark 4.0 and Java 17, which are an extra: pip install 'gpsd-dist[spark]' "
            "(400 MB), or use --engine duckdb"
        )
    from data_pipeline import spark_engine

    return spark_engine


@contextlib.contextmanager
def scratch(options: BuildOptions, parent: pathlib.Path, raw_bytes: int) -> typing.Iterator[Engine]:
    """Opens the engine that the options name, with a scratch folder in `parent` that is removed at the end.

    `raw_bytes`: size of the raw files. Stored tables of small logs are not compressed, because their space is nothing.
    """
    settings = _settings(options)
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pipeline-scratch-", dir=parent) as folder:
        engine = Engine(
            options.engine,
            pathlib.Path(folder),
            options.memory_limit,
            options.threads,
            spark_master=options.spark_master,
            spark_settings=settings,
            saves_space=raw_bytes > SMALL_LOG_BYTES,
        )
        try:
            yield engine
        except engine.backend.errors as error:
            lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(_NO_NEWS)]
            text = (lines or [type(error).__name__])[0].lstrip(": ")[:500]
            raise EngineFailed(
                f"--engine {options.engine} failed: {text}; if it ran out of memory or of disk, see --memory_limit, "
                "--num_buckets and the space beside --out_dir"
            ) from error
        finally:
            engine.close()


def _settings(options: BuildOptions) -> dict[str, str]:
    """Parses --spark_conf; ValueError for options of the other engine, which would have no effect."""
    if options.engine == "duckdb" and (options.spark_master or options.spark_conf):
        raise ValueError("--spark_master and --spark_conf have no effect with --engine duckdb; add --engine spark")
    if options.engine == "spark" and options.threads is not None:
        raise ValueError("--threads is of --engine duckdb; give Spark its cores by --spark_master local[N]")
    pairs = [entry.partition("=") for entry in options.spark_conf]
    wrong = ["".join(pair) for pair in pairs if not pair[1]]
    if wrong:
        raise ValueError(f"--spark_conf {wrong[0]!r} is not of the form KEY=VALUE")
    return {key: value for key, _, value in pairs}
