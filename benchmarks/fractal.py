"""Expands a real set of ratings to billions of rows, to load a system with (fractal expansion, arXiv:1901.08910).

    python -m benchmarks.fractal --raw_dir RAW --out_dir BIG --user_blocks 16 --item_blocks 32 --seed 0

Reads a MovieLens-format folder (ratings.csv or ratings.dat, also MovieTweetings) or a Parquet file with named columns,
and writes Parquet files and a schema.toml for `data_pipeline.build --source generic`. Users and items multiply by the
numbers of blocks; the long tails of both stay. Memory holds the ratings once (16 bytes each), never the result.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from benchmarks import fractal_blocks
from data_pipeline import progress

COLUMNS_CSV = ("userId", "movieId", "rating", "timestamp")
SCHEMA_TOML = """# Fractal expansion; see data_pipeline/sources/README.md.
[history]
files = "part-*.parquet"
user = "user"
item = "item"
time = "time_s"
keep_copies = true

[split]
rule = "leave_last_out"
"""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status. A user's mistake prints one line and gives 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--raw_dir", type=pathlib.Path, required=True, help="folder with ratings.csv or ratings.dat")
    parser.add_argument("--parquet", help="instead of ratings.*: name of a Parquet file in --raw_dir")
    parser.add_argument(
        "--columns",
        default=",".join(COLUMNS_CSV),
        help="of --parquet, by commas: user, item, rating, time",
    )
    parser.add_argument("--out_dir", type=pathlib.Path, required=True, help="a new or empty folder")
    for field in dataclasses.fields(fractal_blocks.Expansion):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=f"default {field.default}")
    parser.add_argument("--file_rows", type=int, default=20_000_000, help="rows per part file, about")
    options = vars(parser.parse_args(argv))
    names = [field.name for field in dataclasses.fields(fractal_blocks.Expansion)]
    try:
        expansion = fractal_blocks.Expansion(**{name: options[name] for name in names})
        ratings = read_ratings(options["raw_dir"], options["parquet"], options["columns"].split(","))
        about = write(ratings, expansion, options["out_dir"], options["file_rows"])
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(about, indent=1) + "\n")
    return 0


def read_ratings(raw_dir: pathlib.Path, parquet: str | None, columns: list[str]) -> fractal_blocks.Ratings:
    """Reads the ratings of a MovieLens-format folder or of a Parquet file. ValueError says what is missing."""
    if parquet is not None:
        path = raw_dir / parquet
        _require(path)
        found = pq.read_schema(path).names
        if len(columns) != 4 or not set(columns) <= set(found):
            raise ValueError(f"{path} has the columns {found}; name user, item, rating and time of it by --columns")
        return fractal_blocks.compact(*(pq.read_table(path, columns=[name])[name] for name in columns))
    path = raw_dir / "ratings.csv"
    if path.is_file():
        table = pa.csv.read_csv(path)
        missing = [name for name in COLUMNS_CSV if name not in table.column_names]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}; it has {table.column_names}")
        return fractal_blocks.compact(*(table[name] for name in COLUMNS_CSV))
    path = raw_dir / "ratings.dat"
    _require(path)
    # Arrow takes one character as separator, so "::" leaves an empty column between every two fields.
    names = ["user", "1", "item", "2", "rating", "3", "time"]
    reading = pa.csv.ReadOptions(column_names=names)
    table = pa.csv.read_csv(path, read_options=reading, parse_options=pa.csv.ParseOptions(delimiter=":"))
    return fractal_blocks.compact(*(table[name] for name in ("user", "item", "rating", "time")))


def _require(path: pathlib.Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; --raw_dir is a folder with ratings.csv or ratings.dat, or --parquet")


def write(
    ratings: fractal_blocks.Ratings, expansion: fractal_blocks.Expansion, out_dir: pathlib.Path, file_rows: int
) -> dict:
    """Streams the expansion to `out_dir`; returns the content of about.json. Equal input gives equal bytes."""
    if file_rows < 1:
        raise ValueError(f"--file_rows {file_rows} must be at least 1")
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ValueError(f"--out_dir {out_dir} is not empty; choose another folder or empty it")
    out_dir.mkdir(parents=True, exist_ok=True)
    rates = fractal_blocks.block_rates(ratings, expansion)
    expected = float(rates.sum()) * ratings.num_ratings
    progress.say(f"{ratings.num_ratings:,} ratings x {rates.size} blocks: about {expected:,.0f} rows -> {out_dir}")
    num_rows, num_files, rows_in_file, writer = 0, 0, 0, None
    with progress.bar() as shown:
        bar = shown.add_task("  rows", total=round(expected))
        for batch in fractal_blocks.batches(ratings, rates, expansion):
            if writer is None or rows_in_file >= file_rows:
                if writer is not None:
                    writer.close()
                writer = pq.ParquetWriter(
                    out_dir / f"part-{num_files:05d}.parquet", fractal_blocks.SCHEMA, compression="zstd"
                )
                num_files, rows_in_file = num_files + 1, 0
            writer.write_batch(batch)
            num_rows, rows_in_file = num_rows + batch.num_rows, rows_in_file + batch.num_rows
            shown.update(bar, advance=batch.num_rows)
    if writer is not None:
        writer.close()
    (out_dir / "schema.toml").write_text(SCHEMA_TOML)
    about = {
        "options": dataclasses.asdict(expansion),
        "source": {"ratings": ratings.num_ratings, "users": ratings.num_users, "items": ratings.num_items},
        "expected_rows": round(expected),
        "rows": num_rows,
        "users_at_most": ratings.num_users * expansion.user_blocks,
        "items_at_most": ratings.num_items * expansion.item_blocks,
        "largest_rate": float(np.max(rates)),
        "smallest_rate": float(np.min(rates)),
    }
    (out_dir / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    return about


if __name__ == "__main__":
    sys.exit(main())
