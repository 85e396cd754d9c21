"""Runs the pipeline's queries by Spark: the same Ibis expressions on a cluster, or on one machine (`local[N]`).

Needs the extra `spark` (PySpark 4.0: Ibis 12 does not know 4.1) and Java 17. Stored tables are Parquet files in the
scratch folder beside `--out_dir`, which driver and executors must both see. The driver streams the sorted rows of a
split into the part files, so that these are the same as DuckDB's.
"""

import itertools
import os
import pathlib
import re
import shutil
import sys
import typing

import ibis.expr.types as ir
import py4j.protocol
import pyarrow as pa
import pyarrow.parquet as pq
import pyspark.cloudpickle
import pyspark.errors
import pyspark.sql
import pyspark.sql.functions as F
from ibis.backends.pyspark import Backend
from ibis.backends.pyspark.datatypes import PySparkSchema

from data_pipeline import spark_json

ERRORS = (pyspark.errors.PySparkException, py4j.protocol.Py4JJavaError)
_SETTINGS = {
    "spark.app.name": "data_pipeline",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "ERROR",
    "spark.sql.session.timeZone": "UTC",
    # DuckDB does the same: an index outside an array gives null, and an overflow would be our own mistake.
    "spark.sql.ansi.enabled": "false",
    "spark.sql.legacy.sizeOfNull": "false",
    # Ibis nests one query per step. At the default limit of 100 rounds the optimizer only warns.
    "spark.sql.maxPlanStringLength": "10000",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.autoBroadcastJoinThreshold": str(64 << 20),
}


class SparkBackend(Backend):
    """Replaces Ibis' own backend: Arrow, not pickled pandas, between Python and the JVM, and files for memtables."""

    scratch_dir: pathlib.Path

    def execute(self, expr, /, *, params=None, limit=None, **kwargs):
        """Returns a data frame, series or scalar, as Ibis does."""
        self._run_pre_execute_hooks(expr)
        table = expr.as_table()
        query = self._session.sql(self.compile(table, params=params, limit=limit, **kwargs))
        return expr.__pandas_result__(query.toArrow().to_pandas())

    def to_pyarrow(self, expr, /, *, params=None, limit=None, **kwargs):
        """Returns an Arrow table, column or scalar, as Ibis does."""
        self._run_pre_execute_hooks(expr)
        table = expr.as_table()
        query = self._session.sql(self.compile(table, params=params, limit=limit, **kwargs))
        return expr.__pyarrow_result__(query.toArrow().cast(table.schema().to_pyarrow()))

    def _register_in_memory_table(self, op) -> None:
        path = self.scratch_dir / f"{op.name}.parquet"
        pq.write_table(op.data.to_pyarrow(op.schema), path)
        rows = self._session.read.option("__globPaths__", "false").parquet(str(path))
        rows.createOrReplaceTempView(op.name)


class Spark:
    """Has the methods of `duckdb_engine.DuckDB` on a Spark session, which ends with `close`."""

    errors = ERRORS

    def __init__(self, scratch_dir: pathlib.Path, memory_limit: str, master: str, settings: dict[str, str]):
        """Starts Spark; ValueError if it cannot start.

        `memory_limit` ("4GB") is that of the driver and of every executor.
        """
        if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
            raise ValueError("--engine spark needs Java 17 on PATH or in JAVA_HOME; install it, or use --engine duckdb")
        found = re.fullmatch(r"(\d+)\s*([KMG])I?B", memory_limit.upper())
        if not found:
            raise ValueError(f"--memory_limit {memory_limit} is no size for Spark; give a whole number such as 4GB")
        memory = f"{found[1]}{found[2].lower()}"
        builder = pyspark.sql.SparkSession.builder.master(master)
        local = {"spark.local.dir": str(scratch_dir / "spill"), "spark.sql.warehouse.dir": str(scratch_dir / "none")}
        sizes = {"spark.driver.memory": memory, "spark.executor.memory": memory}
        if master.startswith("local"):  # the default of 200 shuffle partitions is meant for clusters
            sizes["spark.sql.shuffle.partitions"] = "8"
            sizes["spark.pyspark.python"] = sys.executable
        for key, value in (_SETTINGS | local | sizes | settings).items():
            builder = builder.config(key, value)
        try:
            self._session = builder.getOrCreate()
        except (*ERRORS, RuntimeError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ValueError(f"Spark cannot start with --spark_master {master} ({first_line})") from error
        self.con = SparkBackend()
        self.con.scratch_dir = self._folder = scratch_dir
        self.con.register_options()  # `ibis.pyspark` would do it, but makes Ibis' own class only
        self.con.do_connect(self._session)
        self._numbers = itertools.count()
        self._paths: dict[str, pathlib.Path] = {}
        _add_functions(self._session)

    def create(self, name: str, table: ir.Table) -> ir.Table:
        """Runs the query and stores the result under a new name."""
        path = self._folder / f"table-{next(self._numbers)}"
        self._query(table).write.parquet(str(path))
        self._paths[name] = path
        return self._view(name, path)

    def count(self, name: str) -> int:
        """Counts the rows of a stored table."""
        return int(self.con.table(name).count().execute())

    def append(self, name: str, table: ir.Table) -> None:
        """Adds the query's rows to a stored table of the same columns."""
        path = self._paths[name]
        self._query(table).write.mode("append").parquet(str(path))
        self._view(name, path)  # a view lists its files when it is made

    def drop(self, name: str) -> None:
        """Removes a stored table."""
        self._session.catalog.dropTempView(name)
        shutil.rmtree(self._paths.pop(name))

    def from_stream(self, name: str, schema: pa.Schema, batches: typing.Iterator[pa.RecordBatch]) -> ir.Table:
        """Stores a stream of Arrow batches, through the driver."""
        path = self._folder / f"arrow-{next(self._numbers)}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return self._view(name, path)

    def batches(self, table: ir.Table, num_rows: int) -> typing.Iterator[pa.RecordBatch]:
        """Streams the query's result, sorted on the cluster, in batches of at most `num_rows` rows."""
        path = self._folder / f"result-{next(self._numbers)}"
        self._query(table).write.parquet(str(path))
        for part in sorted(path.glob("part-*.parquet")):  # numbered in the order of the sort
            yield from pq.ParquetFile(part).iter_batches(batch_size=num_rows)
        shutil.rmtree(path)

    def close(self) -> None:
        """Ends the session."""
        self._session.stop()

    def _query(self, table: ir.Table) -> "pyspark.sql.DataFrame":
        """Casts the query to the types that Ibis believes in: it takes many an int32 of Spark for an int64."""
        self.con._run_pre_execute_hooks(table)  # registers memtables
        rows = self._session.sql(self.con.compile(table))
        fields = PySparkSchema.from_ibis(table.schema()).fields
        return rows.select(
            [F.col("`" + f.name.replace("`", "``") + "`").cast(f.dataType).alias(f.name) for f in fields]
        )

    def _view(self, name: str, path: pathlib.Path) -> ir.Table:
        # Without the option, letters of a folder's name such as [ are a pattern.
        rows = self._session.read.option("__globPaths__", "false").parquet(str(path))
        rows.createOrReplaceTempView(name)
        return self.con.table(name)


def _add_functions(session: "pyspark.sql.SparkSession") -> None:
    """Adds DuckDB's functions that `sources/json_lines.py` names."""
    pyspark.cloudpickle.register_pickle_by_value(spark_json)  # executors need not have this package
    session.udf.register("json_valid", spark_json.is_valid, "boolean")
    session.udf.register("json_type", spark_json.kind, "string")
    session.udf.register("json_extract_string", spark_json.extract, "string")
    session.udf.register("json_extract_strings", spark_json.extract_all, "array<string>")
