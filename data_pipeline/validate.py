"""Checks every invariant of a data set again, on what was written.

    python -m data_pipeline.validate OUT

Each problem is reported once, at its first offender: file, column and row (0-based in the file).
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m data_pipeline.validate ...")

from gpsd_dist.cli.missing import require

if __name__ == "__main__":
    require("ibis", "duckdb")

import argparse
import itertools
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline import validate_rows, vocab
from gpsd_dist import schema
from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.data import data_versions
from gpsd_dist.disk.reading import raise_if_passing
from gpsd_dist.disk.text import say_error, shown

EXACT_TIME_RULE = (
    "TimeBoundaries"  # the only rule that cuts by time alone; the others break ties of equal times by order
)
USER_RULES = ("LastItemByTime", "Given")  # a user lies in one of train, valid, test


def check(root: pathlib.Path, only: str | None = None) -> schema.Manifest:
    """Checks the data set in `root`, its current version; ValueError lists the first offender of every kind of problem.

    `only`: a split that lies there without the rest of its data set.
    """
    root = data_versions.current(root)
    manifest = schema.read_manifest(root)
    problems = validate_rows.Problems()
    if only is not None:
        check_split(root, manifest, manifest.split(only), problems)
        problems.raise_if_any(root)
        return manifest
    sizes = {table.name: manifest.value_limit(table.name) for table in manifest.tables}
    for table in manifest.tables:
        if table.name not in manifest.unbounded:
            _check_vocab(root / "vocab" / f"{table.name}.parquet", table, problems)
    _check_items(root / "items.parquet", manifest, sizes, problems)
    users = {split.name: check_split(root, manifest, split, problems) for split in manifest.splits}
    _check_order(manifest, users, problems)
    problems.raise_if_any(root)
    return manifest


def check_split(
    root: pathlib.Path, manifest: schema.Manifest, split: schema.Split, problems: validate_rows.Problems
) -> np.ndarray:
    """Checks every file of one split, and its counts; returns the user hashes of all rows."""
    expected = schema.arrow_schema(manifest, split.name)
    checker = validate_rows.RowChecker(manifest, problems, has_exact_times=_rule(manifest) == EXACT_TIME_RULE)
    counts = {"num_rows": 0, "num_history_tokens": 0, "num_candidates": 0}
    times: list[int] = []
    users = [np.zeros(0, np.int64)]
    for name in split.files:
        file = _open(root / name, problems)
        if file is None or not _has_schema(root / name, file.schema_arrow, expected, problems):
            continue
        first_row = 0
        try:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                checker.check(root / name, table, first_row)
                first_row += table.num_rows
                counts["num_rows"] += table.num_rows
                counts["num_history_tokens"] += pc.sum(table["history_length"]).as_py() or 0
                if split.name != "pretrain" and table.num_rows:
                    lengths = pc.list_value_length(table[f"candidate.{manifest.item_feature}"])
                    counts["num_candidates"] += pc.sum(lengths).as_py() or 0
                    bounds = pc.min_max(table["request_time_s"]).as_py()
                    times += [bound for bound in bounds.values() if bound is not None]
                users.append(table["user_hash"].to_numpy())
        except (OSError, pa.ArrowInvalid) as error:
            raise_if_passing(root / name, error)
            problems.add("unreadable", f"{root / name}: row group {group} cannot be read ({error}); build again")
    found = counts | {"time_from_s": min(times, default=None), "time_to_s": max(times, default=None)}
    for key, value in found.items():
        if value != getattr(split, key):
            problems.add(
                f"{split.name}.{key}",
                f"split {split.name!r}: the files hold {key} = {value}, the manifest says {getattr(split, key)}",
            )
    return np.concatenate(users)


def _rule(manifest: schema.Manifest) -> str:
    return str(manifest.options.get("split_rule", ""))


def _open(path: pathlib.Path, problems: validate_rows.Problems) -> pq.ParquetFile | None:
    if not path.is_file():
        problems.add("missing file", f"{path} is named by the manifest and does not exist; build again")
        return None
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise_if_passing(path, error)
        problems.add("unreadable", f"{path} is not a readable Parquet file ({error}); build again")
        return None


def _has_schema(path: pathlib.Path, found: pa.Schema, expected: pa.Schema, problems: validate_rows.Problems) -> bool:
    if found.names != expected.names:
        missing = [name for name in expected.names if name not in found.names]
        extra = [name for name in found.names if name not in expected.names]
        problems.add("columns", f"{path}: missing columns {missing}, unexpected {extra}, or another order; build again")
        return False
    for field in expected:
        if found.field(field.name).type != field.type:
            problems.add(
                "type", f"{path}, column {field.name!r}: found {found.field(field.name).type}, expected {field.type}"
            )
            return False
    return True


def _check_vocab(path: pathlib.Path, table: schema.Table, problems: validate_rows.Problems) -> None:
    file = _open(path, problems)
    if file is None or not _has_schema(path, file.schema_arrow, vocab.VOCAB_SCHEMA, problems):
        return
    words = file.read()
    index = words["index"].to_numpy()
    wanted = np.arange(len(index)) + schema.NUM_RESERVED_ROWS
    if not np.array_equal(index, wanted):
        row = int(np.argmax(index != wanted))
        problems.add(
            "vocabulary index", f"{path}, column 'index', row {row}: found {index[row]}, expected {wanted[row]}"
        )
    if pc.count_distinct(words["raw_id"]).as_py() != len(index):
        problems.add("vocabulary id", f"{path}, column 'raw_id': a raw id occurs twice")
    num_rows, fingerprint = vocab.measure(path)
    if (num_rows, fingerprint) != (table.num_rows, table.fingerprint):
        problems.add(
            f"vocabulary {table.name}",
            f"{path}: {num_rows} table rows with fingerprint {fingerprint}; the manifest says {table.num_rows}, "
            f"{table.fingerprint}",
        )


def _check_items(
    path: pathlib.Path, manifest: schema.Manifest, sizes: dict[str, int], problems: validate_rows.Problems
) -> None:
    file = _open(path, problems)
    if file is None:
        return
    items = file.read()
    table_name = manifest.feature(manifest.item_feature).table
    index = items["index"].to_numpy() if "index" in items.column_names else np.zeros(0, np.int64)
    if table_name in manifest.unbounded:
        if (index < schema.NUM_RESERVED_ROWS).any() or (np.diff(index) < 0).any():
            problems.add("items", f"{path}, column 'index': expected ids >= {schema.NUM_RESERVED_ROWS}, ascending")
    elif not np.array_equal(index, np.arange(schema.NUM_RESERVED_ROWS, sizes[table_name])):
        problems.add(
            "items",
            f"{path}, column 'index': expected every index 2 ... {sizes[table_name] - 1} of {table_name!r}, ascending",
        )
    for name in items.column_names[1:]:
        feature = manifest.feature(name)
        values = items[name].combine_chunks()
        values = (pc.list_flatten(values) if feature.is_bag else values).to_numpy(zero_copy_only=False)
        if (
            feature.kind == "categorical"
            and len(values)
            and not (values.min() >= 1 and values.max() < sizes[feature.table])
        ):
            problems.add("items", f"{path}, column {name!r}: an index lies outside 1 ... {sizes[feature.table] - 1}")


def _check_order(manifest: schema.Manifest, users: dict[str, np.ndarray], problems: validate_rows.Problems) -> None:
    """Checks that splits are disjoint and follow each other in time, as far as the split rule promises."""
    rule = _rule(manifest)
    splits = [split for split in manifest.splits if split.name != "pretrain" and split.time_from_s is not None]
    if rule == "LeaveLastOut":
        for split in splits:
            if len(np.unique(users[split.name])) != len(users[split.name]):
                problems.add("users", f"split {split.name!r}, column 'user_hash': a user has two rows, expected one")
        return
    for early, late in itertools.pairwise(splits):
        if early.time_to_s > late.time_from_s or (rule == EXACT_TIME_RULE and early.time_to_s == late.time_from_s):
            problems.add(
                "split order",
                f"split {late.name!r} starts at {late.time_from_s}, before split {early.name!r} ends at "
                f"{early.time_to_s} (epoch s)",
            )
        both = np.intersect1d(users[early.name], users[late.name]) if rule in USER_RULES else np.zeros(0)
        if len(both):
            problems.add(
                "split users",
                f"{len(both)} users lie in {early.name!r} and in {late.name!r}, first user_hash {both[0]}",
            )


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; exit status 0 if all is well, 1 with the list of problems otherwise."""
    parser = Parser(prog="python -m data_pipeline.validate", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out_dir", type=pathlib.Path)
    options = parser.parse_args(argv)
    try:
        manifest = check(options.out_dir)
    except (ValueError, OSError) as error:
        return say_error(error, mistake=1)
    rows = ", ".join(f"{split.name} {split.num_rows:,} rows" for split in manifest.splits)
    print(shown(f"{options.out_dir} is valid: {rows}"))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
