"""Files of configs/data for public data sets: raw files of their form -> build -> pretraining -> what they are for."""

import gzip
import json
import math
import shlex

import numpy as np
import pytest

from data_pipeline import build, command_line
from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.trained_run import evaluate_checkpoint
from tests.integration.tiny_data import train_runs
from tests.unit.config.test_gin_cli import CONFIGS

USERS, EVENTS, ITEMS = 60, 6, 25
TAOBAO_S = 1_511_539_200  # its first second
SIZES = ("--gin.EPOCHS=1", "--gin.GLOBAL_BATCH_ROWS=16", "--gin.EMBEDDING_DIM=16", "--gin.TrainConfig.max_steps=2")


def events():
    """(user, item, number) in the order of time."""
    random = np.random.default_rng(0)
    return [(u, int(i), n) for u in range(1, USERS + 1) for n, i in enumerate(random.permutation(ITEMS)[:EVENTS] + 1)]


def movielens(folder, ending):
    ratings = [(user, item, 4, 1_000 * number + user) for user, item, number in events()]
    movies = [(item, f"Film {item}", "Drama|War") for item in range(1, ITEMS + 1)]
    heads = {"ratings": "userId,movieId,rating,timestamp\n", "movies": "movieId,title,genres\n"}
    for name, rows in (("ratings", ratings), ("movies", movies)):
        separator, head = ("::", "") if ending == "dat" else (",", heads[name])
        lines = "".join(separator.join(map(str, row)) + "\n" for row in rows)
        (folder / f"{name}.{ending}").write_text(head + lines)


def books(folder):
    lines = [f"A{user},{item:010d},5.0,{1_000 * number + user}\n" for user, item, number in events()]
    (folder / "ratings_Books.csv").write_text("".join(lines))


def electronics(folder):
    rows = [{"reviewerID": f"A{u}", "asin": f"B{i}", "unixReviewTime": 86_400 * n + u, "overall": 5.0}
            for u, i, n in events()]  # fmt: skip
    products = [{"asin": f"B{i}", "categories": [["Electronics", f"Kind {i % 3}"]], "brand": "Q"} for i in range(ITEMS)]
    for name, entries in (("reviews_Electronics_5", rows), ("meta_Electronics", products)):
        (folder / f"{name}.json.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, entries)).encode()))


def taobao(folder):
    lines = [f"{user},{item},{item % 4},pv,{TAOBAO_S + 1_000 * number + user}\n" for user, item, number in events()]
    (folder / "UserBehavior.csv").write_text("".join(lines))


RAW = {
    "ml1m": lambda folder: movielens(folder, "dat"),
    "ml20m": lambda folder: movielens(folder, "csv"),
    "books": books,
    "amazon_reviews": electronics,
    "taobao": taobao,
}


def stated_command(leaf: str) -> list[str]:
    """The options of the build command in the header of a file."""
    text = (CONFIGS / "data" / f"{leaf}.gin").read_text().replace("\\\n#", " ")
    [line] = [line for line in text.splitlines() if "data_pipeline.build" in line]
    return shlex.split(line.split("data_pipeline.build", 1)[1].split(" # ")[0])


@pytest.mark.parametrize("leaf", RAW)
def test_the_whole_path_of_a_data_file(leaf, tmp_path, monkeypatch, one_rank):
    argv = stated_command(leaf)
    raw, out = (argv[argv.index(name) + 1] for name in ("--raw_dir", "--out_dir"))
    (tmp_path / raw).mkdir(parents=True)
    RAW[leaf](tmp_path / raw)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    build.build(command_line.parse(argv), "test")

    def trained(stage, *overrides):
        files = [f"--gin_file=configs/{name}.gin" for name in (f"stage/{stage}", f"data/{leaf}", "model/l1h32a4")]
        run = load_run_config([*files, f"--gin.OUTPUT_DIR={tmp_path / stage}", *SIZES, *overrides]).run
        assert run.data_dir == out
        train_runs(0, 1, [run])
        return evaluate_checkpoint(tmp_path / stage, None, "test", one_rank)

    found = trained("pretrain")["next_item"]
    assert found["rows"] > 5 and 0 < found["mrr"] < 1 and found["unknown_targets"] < found["rows"] / 2
    if leaf in ("amazon_reviews", "taobao"):
        scored = trained("finetune", "--gin.STRATEGY=FT_SF", f"--gin.INIT_CHECKPOINT={tmp_path / 'pretrain'}")
        assert scored["click"]["rows"] > 10 and math.isfinite(scored["click"]["log_loss"])
