"""Measures how well new items are scored on a later day, by what their rows are: random, unknown, like others, trained.

python -m benchmarks.new_items --raw_dir RAW/movietweetings --out_dir runs/new_items --seeds 0,1,2

A log of MovieTweetings is cut into periods of 14 days: all before, then P1 to P4. The model is pretrained on what lies
before P1. Two appends later P3 is `valid`, P4 is `test`, and movies first rated in P1 or P2 have rows that the
pretraining did not have. Finetuning freezes the table. No row that it trains on holds a new item (they are unknown
there), so its last weights do not depend on the new rows, and each kind is put in their place to be scored. "trained":
pretraining goes on with the new rows alone, from "attributes", all other weights held.

Each rating is a request with the movie, two uniform movies that had been rated by then, and one of those first rated in
the six weeks before: without the last there would be hardly a new item among the negatives.
"""

import argparse
import collections
import collections.abc
import datetime
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gpsd_dist.data import data_versions
from gpsd_dist.distributed.runtime import process_group
from gpsd_dist.metrics.auc_interval import auc_by_user
from gpsd_dist.schema import read_manifest
from gpsd_dist.stages.stage import evaluate_split
from gpsd_dist.tables.new_rows import shared_attributes, start_new_rows
from gpsd_dist.trained_run import TIMEOUT_S, load_trained

_DAY_S = 86_400
_PERIOD_DAYS, _EXPOSURE_DAYS, _YOUNG_DAYS = 14, 42, 42
_SCHEMA = """
[history]
files = "events.parquet"
user = "user"
item = "item"
time = "time"
[exposure]
files = "exposures.parquet"
user = "user"
item = "item"
time = "time"
task = [{{ column = "click" }}]
[items]
files = "items.parquet"
item = "item"
feature = [{{ column = "genres", kind = "bag", separator = "|" }}, {{ column = "year" }}]
[split]
valid_from = {valid_from}
test_from = {test_from}
"""
_OFF = ("--gin.PATIENCE=0",)  # the last weights are scored, whatever `valid` says of new rows


def read_movies(raw: pathlib.Path) -> tuple[np.ndarray, dict[int, tuple[str, str]]]:
    """Reads MovieTweetings: int64 [N, 3] of user, movie and time in order of time, and movie -> (genres, year)."""
    lines = (raw / "ratings.dat").read_text().splitlines()
    ratings = np.array([[int(field) for i, field in enumerate(line.split("::")) if i != 2] for line in lines])
    movies = {}
    for line in (raw / "movies.dat").read_text(errors="replace").splitlines():
        item, title, genres = line.split("::")
        year = re.search(r"\((\d{4})\)$", title)
        movies[int(item)] = (genres, year.group(1) if year else "")
    return ratings[np.argsort(ratings[:, 2], kind="stable")], movies


def draw_exposures(ratings: np.ndarray, begin_s: int) -> np.ndarray:
    """Draws the candidates of each rating from `begin_s` on: int64 [M, 4] of user, movie, time, label."""
    random, rows = np.random.default_rng(0), []
    items, first = np.unique(ratings[:, 1], return_index=True)
    items, first_s = items[np.argsort(first)], np.sort(ratings[first, 2])
    own = collections.defaultdict(set)
    for user, item, _ in ratings:
        own[user].add(item)
    for user, item, time_s in ratings[ratings[:, 2] >= begin_s]:
        rows.append((user, item, time_s, 1))
        end = np.searchsorted(first_s, time_s, side="right")
        young = np.searchsorted(first_s, time_s - _YOUNG_DAYS * _DAY_S)
        drawn = [*random.integers(0, end, 2), *random.integers(young, end, 1)]
        rows += [(user, items[place], time_s, 0) for place in drawn if items[place] not in own[user]]
    return np.array(rows)


def write_logs(raw: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the log as it was after P2, P3 and P4 into `out`/0, 1, 2."""
    ratings, movies = read_movies(raw)
    end_s = int(ratings[-1, 2] // _DAY_S + 1) * _DAY_S
    cuts_s = [end_s - _PERIOD_DAYS * _DAY_S * back for back in (4, 3, 2, 1, 0)]
    exposures = draw_exposures(ratings, cuts_s[0] - _EXPOSURE_DAYS * _DAY_S)
    dates = [datetime.datetime.fromtimestamp(cut, datetime.UTC).date().isoformat() for cut in cuts_s[:2]]
    for number, until_s in enumerate(cuts_s[2:]):
        folder = out / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "schema.toml").write_text(_SCHEMA.format(valid_from=dates[0], test_from=dates[1]))
        for name, rows in (("events", ratings), ("exposures", exposures)):
            columns = dict(zip(("user", "item", "time", "click"), rows[rows[:, 2] < until_s].T, strict=False))
            pq.write_table(pa.table(columns), folder / f"{name}.parquet")
        genres, years = zip(*movies.values(), strict=True)
        pq.write_table(pa.table({"item": list(movies), "genres": genres, "year": years}), folder / "items.parquet")


def run(*command: object) -> None:
    """Runs a module of this repository; ends this process where it fails."""
    if subprocess.run([sys.executable, "-m", *map(str, command)]).returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")


def train(stage: str, data: pathlib.Path, out: pathlib.Path, seed: int, *options: str) -> None:
    """Trains the smallest tower on `data`; a run that is finished is left as it is."""
    files = [f"--gin_file=configs/{name}.gin" for name in (f"stage/{stage}", "model/l1h32a4")]
    shared = [f"--gin.DATA_DIR={data}", f"--gin.OUTPUT_DIR={out}", f"--gin.SEED={seed}"]
    run("gpsd_dist.train", *files, *shared, "--gin.DataConfig.unknown_rate=0.03", *options)


def item_rows(checkpoint: pathlib.Path, data: pathlib.Path) -> torch.Tensor:
    """Reads the item table of a run's last weights: [rows, E]."""
    with process_group(TIMEOUT_S) as runtime:
        weights = load_trained(checkpoint, str(data), "valid", runtime, "last").components.tables.weights()
        return weights["item"].local_shards()[0].tensor.clone()


def kinds(old: torch.Tensor, items: pathlib.Path, trained: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Makes the item table with every kind of new rows; `old`, `trained`: [rows, E] with old rows that are the same."""
    num_old = int((old == trained).all(dim=1).long().cumprod(0).sum())
    manifest = read_manifest(items.parent)
    attributes = shared_attributes(items, manifest, num_old)
    chance = torch.randn(old.shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    found = {"random": torch.cat([old[:num_old], chance[num_old:]]), "unknown": old.clone(), "attributes": old.clone()}
    start_new_rows(found["unknown"], num_old)
    start_new_rows(found["attributes"], num_old, attributes.values())
    mean = old[2:num_old].mean(dim=0)
    found["sum"] = torch.cat([old[:num_old], found["attributes"][num_old:] + mean])
    found["alike alone"] = torch.cat([old[:num_old], found["sum"][num_old:] - old[1]])
    return found | {"trained": trained}


def scores(
    checkpoint: pathlib.Path, data: pathlib.Path, split: str, tables: dict[str, torch.Tensor], num_old: int
) -> collections.abc.Iterator[dict]:
    """Scores a split with each item table: AUC of all candidates and of new items, with the latter's half width."""
    with process_group(TIMEOUT_S) as runtime:
        run = load_trained(checkpoint, str(data), split, runtime, "last")
        live = run.components.tables.weights()["item"].local_shards()[0].tensor
        for kind, rows in tables.items():
            assert torch.equal(live[:num_old], rows[:num_old])
            live.copy_(rows)
            keep: dict = {}
            evaluate_split(run.run, run.manifest, run.components, split, None, keep)
            score, label, user, _, item = keep["click"].arrays()[:5]
            is_new = item >= num_old
            whole, new = (auc_by_user(score[k], label[k], user[k]) for k in (np.full(len(item), True), is_new))
            found = {"rows": kind, "split": split, "all": whole.auc, "new": new.auc, "new_half_width": new.half_width}
            yield found | {"candidates": int(is_new.sum()), "clicked": int(label[is_new].sum())}


def main(argv: list[str]) -> int:
    """Prints one line per seed, kind of rows and split."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.new_items", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--raw_dir", type=pathlib.Path, required=True)
    parser.add_argument("--out_dir", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--splits", default="valid")
    kinds_help = "of random, unknown, attributes, trained, sum (nothing subtracted), alike alone (no unknown row)"
    parser.add_argument("--kinds", default="random,unknown,attributes,trained", help=kinds_help)
    args = parser.parse_args(argv)
    raw, data = args.out_dir / "raw", args.out_dir / "data"
    if not raw.exists():
        write_logs(args.raw_dir, raw)
    for number in range(3):
        before = ["--append_to", data / str(number - 1)] if number else []
        folders = [f"--raw_dir={raw / str(number)}", *before, f"--out_dir={data / str(number)}"]
        run("data_pipeline.build", "--source=generic", *folders)
    first, last = (data_versions.opened(data / day) for day in "02")
    num_old = read_manifest(first).table("item").num_rows
    for seed in map(int, args.seeds.split(",")):
        runs = args.out_dir / f"s{seed}"
        source = f"--gin.INIT_CHECKPOINT={runs / 'pretrain'}"
        train("pretrain", first, runs / "pretrain", seed, "--gin.EPOCHS=5")
        alone = ["--gin.STRATEGY=FT_SF", "--gin.TablesConfig.frozen_rows=auto", "--gin.DENSE_LR=0.0", source]
        train("pretrain", last, runs / "goes_on", seed, *alone, "--gin.EPOCHS=1", *_OFF)
        train("finetune", last, runs / "st_sf", seed, "--gin.STRATEGY=ST_SF", source, "--gin.EPOCHS=4", *_OFF)
        trained = item_rows(runs / "goes_on", last)
        made = kinds(item_rows(runs / "st_sf", last), last / "items.parquet", trained, seed)
        tables = {kind: made[kind] for kind in args.kinds.split(",")}
        for split in args.splits.split(","):
            for found in scores(runs / "st_sf", last, split, tables, num_old):
                print(json.dumps({"seed": seed} | found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
