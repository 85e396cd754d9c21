"""Writes a synthetic shop log in the format of the `generic` source: what `make quickstart` trains on.

    python -m data_pipeline.synthesize --out_dir RAW --num_users 12000 --seed 0
    python -m data_pipeline.synthesize --out_dir RAW --format csv

Everything is drawn from `--seed` (`data_pipeline/synthetic_log.py`): the same options give the same bytes. The true
probabilities never reach the log; `about.json` holds the AUC that they would score, which is the ceiling of any model.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m data_pipeline.synthesize ...")

import contextlib
import dataclasses
import datetime
import json
import pathlib
import typing

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data_pipeline import synthetic_log
from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.disk import writing
from gpsd_dist.disk.text import say_error

FILE_NAMES = ("behaviours.parquet", "exposures.parquet", "items.parquet", "users.parquet", "schema.toml", "about.json")
FORMATS = ("parquet", "csv")

_SCHEMA_TOML = """# Describes the files beside it for `--source generic`; see data_pipeline/sources/README.md.
[history]
files = "behaviours.parquet"
user = "user"
item = "item"
time = "time_s"
event = "event"
feature = [{{ column = "event" }}]
keep_copies = true

[exposure]
files = "exposures.parquet"
user = "user"
item = "item"
time = "time_s"
request = "request"
task = [{{ column = "click" }}, {{ column = "buy", given = "click" }}]
feature = [{{ column = "slot", place = "candidate" }}, {{ column = "tab", place = "candidate" }}]
keep_copies = true

[items]
files = "items.parquet"
item = "item"
feature = [{{ column = "category" }}, {{ column = "brand" }}, {{ column = "price", kind = "numerical" }}]

[users]
files = "users.parquet"
user = "user"
feature = [{{ column = "age_group" }}, {{ column = "region" }}, {{ column = "activity", kind = "numerical" }}]

[split]
rule = "time"
time_zone = "UTC"
valid_from = {valid_from}
test_from = {test_from}

[options]
max_history_length = {max_history_length}
min_count = {min_count}
"""


def schema_toml(config: synthetic_log.SyntheticConfig) -> str:
    """Describes the files for the `generic` source."""
    days = [datetime.datetime.fromtimestamp(time_s, datetime.UTC).date() for time_s in config.boundaries_s[1:3]]
    return _SCHEMA_TOML.format(
        valid_from=days[0], test_from=days[1], max_history_length=config.max_history_length, min_count=config.min_count
    )


def write(config: synthetic_log.SyntheticConfig, out_dir: str | pathlib.Path, file_format: str = "parquet") -> dict:
    """Writes the files of `FILE_NAMES` to `out_dir`, tables as Parquet or "csv"; returns the content of `about.json`.

    In memory: one block of users, the items, and 26 bytes of every exposure for the AUC of the true probabilities.
    """
    out_dir = pathlib.Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    truths, num_behaviours = [], 0
    writers: dict[str, pq.ParquetWriter | pyarrow.csv.CSVWriter] = {}
    with contextlib.ExitStack() as files:
        for log in synthetic_log.blocks(config):
            for name in ("behaviours", "exposures", *(() if writers else ("items",)), "users"):
                table = getattr(log, name)
                if name not in writers:
                    file = files.enter_context(writing.replacing(out_dir / f"{name}.{file_format}"))
                    writers[name] = files.enter_context(_writer(file, file_format, table.schema))
                writers[name].write_table(table)
            num_behaviours += log.behaviours.num_rows
            truths.append(Truth.of(log))
    toml = schema_toml(config).replace('.parquet"', f'.{file_format}"')
    writing.write(out_dir / "schema.toml", toml.encode())
    about = {"options": dataclasses.asdict(config), **describe(config, truths, num_behaviours)}
    writing.write_json(out_dir / "about.json", about)
    return about


def _writer(file: typing.BinaryIO, file_format: str, columns: pa.Schema) -> pq.ParquetWriter | pyarrow.csv.CSVWriter:
    if file_format == "csv":
        return pyarrow.csv.CSVWriter(file, columns)
    return pq.ParquetWriter(file, columns, compression="zstd")


class Truth(typing.NamedTuple):
    """Holds what `describe` needs of every exposure."""

    time_s: np.ndarray
    click: np.ndarray
    buy: np.ndarray
    click_probability: np.ndarray
    buy_probability: np.ndarray

    @classmethod
    def of(cls, log: synthetic_log.SyntheticLog) -> "Truth":
        """Takes it from the exposures of one block."""
        time_s, click, buy = (log.exposures[name].to_numpy() for name in ("time_s", "click", "buy"))
        return cls(time_s, click, buy, log.click_probability, log.buy_probability)


def describe(config: synthetic_log.SyntheticConfig, truths: list[Truth], num_behaviours: int) -> dict:
    """Computes counts, rates, and per split the AUC of the true probabilities: no model can expect more."""
    log = Truth(*(np.concatenate(parts) for parts in zip(*truths, strict=True)))
    time_s, click, buy = log.time_s, log.click, log.buy
    about = {"behaviours": num_behaviours, "exposures": len(time_s), "splits": {}}
    bounds = config.boundaries_s
    for name, start, end in zip(("train", "valid", "test"), bounds[:-1], bounds[1:], strict=True):
        inside = (time_s >= start) & (time_s < end)
        clicked = inside & (click == 1)
        about["splits"][name] = {
            "exposures": int(inside.sum()),
            "click_rate": round(float(click[inside].mean()), 4),
            "buy_rate_given_click": round(float(buy[clicked].mean()), 4) if clicked.any() else None,
            "oracle_click_auc": area_under_curve(log.click_probability[inside], click[inside]),
            "oracle_buy_given_click_auc": area_under_curve(log.buy_probability[clicked], buy[clicked]),
        }
    return about


def area_under_curve(score: np.ndarray, label: np.ndarray) -> float | None:
    """Computes AUC with ties counted half; None if a class is missing."""
    positive = np.asarray(label) == 1
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return None
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[inverse]
    return round(
        float((rank[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)), 4
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command line: one option per field of `synthetic_log.SyntheticConfig`. Status 2: sizes do not fit."""
    summary = __doc__.splitlines()[0]
    parser = Parser(prog="python -m data_pipeline.synthesize", description=summary, allow_abbrev=False)
    parser.add_argument("--out_dir", required=True, type=pathlib.Path, help="folder for the files")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=f"of the tables (default {FORMATS[0]})")
    for field in dataclasses.fields(synthetic_log.SyntheticConfig):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=f"default {field.default}")
    options = vars(parser.parse_args(argv))
    out_dir, file_format = options.pop("out_dir"), options.pop("format")
    try:
        about = write(synthetic_log.SyntheticConfig(**options), out_dir, file_format)
    except (ValueError, OSError) as error:
        return say_error(error)
    sys.stdout.write(json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
