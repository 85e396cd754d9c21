"""Compares the CPU time of `data_pipeline.build` with that of plain DuckDB SQL that makes the same files.

    python -m benchmarks.build_cost --num_events 1_000_000 --pairs 3
    python -m benchmarks.build_cost --num_events 40_000 --long_user       # one user with all rows, and 8,300 users

Draws a log of impressions (user, item, time, click) and a file of items, and runs both sides by turns, one thread and a
process each. The SQL is what an analyst would write: it trusts the log, counts nothing, and checks nothing
afterwards. Both write vocabularies, `items.parquet` and four splits, whose rows, tokens, labels and indices must be
equal. Prints one JSON line per side and one with the ratio of CPU seconds.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpsd_dist import schema
from gpsd_dist.data import data_versions

DAY_S, FIRST_S = 86_400, 1_700_006_400  # 2023-11-15 00:00 UTC
DAYS, VALID_DAY, TEST_DAY = 20, 18, 19
EVENTS_PER_USER, LIMIT, SPLITS = 45, 50, ("pretrain", "train", "valid", "test")
SCHEMA = f"""
[exposure]
files = "shown.parquet"
user = "user"
item = "item"
time = "time_s"
time_unit = "s"
task = [{{ column = "click" }}]
extends_history = "click"
[items]
files = "items.parquet"
item = "item"
feature = [{{ column = "category" }}]
[split]
valid_from = 2023-12-03
test_from = 2023-12-04
[options]
max_history_length = {LIMIT}
"""


TABLES = """
CREATE TABLE shown AS
    SELECT DISTINCT ON ("user", item, time_s)
        "user"::VARCHAR AS user_id, item::VARCHAR AS item_id, time_s, click::FLOAT AS click, file_row_number AS place
    FROM read_parquet('{raw}/shown.parquet', file_row_number = true) ORDER BY place;
CREATE TABLE attributes AS
    SELECT item::VARCHAR AS item_id, category::VARCHAR AS category FROM '{raw}/items.parquet';
CREATE TABLE events AS
    SELECT user_id, item_id, time_s, row_number() OVER (PARTITION BY user_id ORDER BY time_s, place) AS place
    FROM shown WHERE click = 1;
CREATE TABLE counts AS
    SELECT item_id AS raw_id, count(*) AS count
    FROM (SELECT item_id, time_s FROM events UNION ALL SELECT item_id, time_s FROM shown)
    WHERE time_s < {valid} GROUP BY ALL;
CREATE TABLE words AS
    SELECT raw_id, row_number() OVER (ORDER BY count DESC, raw_id) + 1 AS index, count FROM counts;
CREATE TABLE categories AS
    SELECT raw_id, row_number() OVER (ORDER BY count DESC, raw_id) + 1 AS index, count
    FROM (SELECT category AS raw_id, sum(count)::BIGINT AS count
          FROM counts JOIN attributes ON raw_id = item_id GROUP BY ALL);
CREATE TABLE items AS
    SELECT item_id, coalesce(w.index, 1) AS item, coalesce(c.index, 1) AS category
    FROM (SELECT item_id FROM attributes UNION SELECT raw_id FROM words)
    LEFT JOIN attributes USING (item_id)
    LEFT JOIN words w ON item_id = w.raw_id LEFT JOIN categories c ON category = c.raw_id;
CREATE TABLE histories AS
    SELECT user_id, list(item ORDER BY place) AS items, list(category ORDER BY place) AS categories,
        list(time_s ORDER BY place) AS times, count(*) FILTER (time_s < {valid}) AS early
    FROM events JOIN items USING (item_id) GROUP BY ALL;
CREATE TABLE requests AS
    SELECT user_id, num, split, min(time_s) AS request_time_s, list(item ORDER BY place) AS item,
        list(category ORDER BY place) AS category, list(click ORDER BY place) AS click
    FROM (SELECT s.*, coalesce(e.place, 0) AS num,
            CASE WHEN s.time_s < {valid} THEN 'train' WHEN s.time_s < {test} THEN 'valid' ELSE 'test' END AS split
          FROM shown s ASOF LEFT JOIN events e ON s.user_id = e.user_id AND s.time_s > e.time_s)
    JOIN items USING (item_id) GROUP BY ALL
"""
HISTORY = """user_id, ('0x' || md5(user_id)[:15])::BIGINT AS user_hash, least({n}, {limit})::INT AS history_length,
    coalesce(items[greatest({n} - {limit}, 0) + 1 : {n}], []) AS "history.item",
    coalesce(categories[greatest({n} - {limit}, 0) + 1 : {n}], []) AS "history.category",
    coalesce(times[greatest({n} - {limit}, 0) + 1 : {n}], []) AS "history.time_s" """
REQUESTS = """SELECT {history}, request_time_s, item AS "candidate.item", category AS "candidate.category",
    click AS "label.click" FROM requests LEFT JOIN histories USING (user_id) WHERE split = '{name}'
    ORDER BY md5(user_id || ':' || split || ':' || num)"""
SUMS = """count(*), sum(history_length), sum(list_sum("history.item")), sum(list_sum("history.category")),
    sum(list_sum("history.time_s")), sum(user_hash)"""
MORE_SUMS = """, sum(request_time_s), sum(len("candidate.item")), sum(list_sum("label.click")),
    sum(list_sum("candidate.item")), sum(list_sum("candidate.category"))"""


def draw(folder: pathlib.Path, num_events: int, num_users: int, seed: int = 0) -> None:
    """Writes the log: users of log-normal activity, items of Zipf popularity, a third of the impressions clicked."""
    random = np.random.default_rng(seed)
    activity = random.lognormal(0, 1, num_users)
    user = random.choice(num_users, num_events, p=activity / activity.sum())
    num_items = max(100, num_events // 50)
    popularity = 1 / np.arange(1, num_items + 1) ** 0.8
    item = random.choice(num_items, num_events, p=popularity / popularity.sum())
    time_s = np.sort(random.integers(FIRST_S, FIRST_S + DAYS * DAY_S, num_events))
    log = {"user": user, "item": item, "time_s": time_s, "click": (random.random(num_events) < 1 / 3).astype(np.int8)}
    folder.mkdir(parents=True)
    pq.write_table(pa.table(log), folder / "shown.parquet", compression="zstd")
    items = {"item": np.arange(num_items), "category": random.integers(0, 300, num_items)}
    pq.write_table(pa.table(items), folder / "items.parquet")
    (folder / "schema.toml").write_text(SCHEMA)


def plain_sql(raw: pathlib.Path, out: pathlib.Path) -> None:
    """Makes the data set by SQL alone."""
    (out / "vocab").mkdir(parents=True)
    con = duckdb.connect(config={"threads": 1, "memory_limit": "4GB"})
    bounds = {"valid": FIRST_S + VALID_DAY * DAY_S, "test": FIRST_S + TEST_DAY * DAY_S, "raw": raw}
    for statement in TABLES.format(**bounds).split(";"):
        con.execute(statement)
    pretrain = HISTORY.format(n="early", limit=LIMIT)
    rows = {
        "pretrain": f"SELECT {pretrain} FROM histories WHERE early > 1 ORDER BY md5(user_id || ':pretrain')",
        "items": "SELECT item AS index, category FROM items WHERE item > 1 ORDER BY item",
        "vocab/item": "FROM words ORDER BY index",
        "vocab/category": "FROM categories ORDER BY index",
    }
    rows |= {name: REQUESTS.format(name=name, history=HISTORY.format(n="num", limit=LIMIT)) for name in SPLITS[1:]}
    for name, query in rows.items():
        con.execute(f"COPY ({query}) TO '{out}/{name}.parquet' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 4096)")


def totals(files: dict[str, list[str]]) -> dict[str, tuple]:
    """Adds up what must be equal on both sides: per split rows, tokens, candidates, labels, and all indices."""
    return {
        split: duckdb.sql(
            f"SELECT {SUMS}{'' if split == 'pretrain' else MORE_SUMS} FROM read_parquet({paths})"
        ).fetchall()[0]
        for split, paths in files.items()
    }


def run(side: str, raw: pathlib.Path, out: pathlib.Path) -> dict:
    """Runs one side in a process of its own; returns its CPU seconds and peak memory."""
    words = ["benchmarks.build_cost", "--plain_sql", str(raw), str(out)]
    if side == "build":
        words = ["data_pipeline.build", "--source", "generic", "--raw_dir", str(raw), "--out_dir", str(out)]
        words += ["--threads", "1"]
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: {side} ended with wait status {status}")
    memory = round(used.ru_maxrss / 2**20, 2)
    return {"side": side, "cpu_s": round(used.ru_utime + used.ru_stime, 2), "peak_rss_gb": memory}


def compare(raw: pathlib.Path, work: pathlib.Path, pairs: int) -> float:
    """Runs both sides by turns; returns the median of the ratios of their CPU seconds."""
    ratios = []
    for number in range(pairs):
        cpu_s = {}
        for side in ("build", "plain_sql"):
            measured = run(side, raw, work / f"{side}{number}")
            cpu_s[side] = measured["cpu_s"]
            print(json.dumps(measured), flush=True)
        ratios.append(cpu_s["build"] / cpu_s["plain_sql"])
    folder = data_versions.current(work / "build0")
    manifest = schema.read_manifest(folder)
    ours = totals({split.name: [str(folder / file) for file in split.files] for split in manifest.splits})
    theirs = totals({split: [str(work / "plain_sql0" / f"{split}.parquet")] for split in SPLITS})
    if ours != theirs:
        raise SystemExit(f"error: the two sides differ: {ours} and {theirs}")
    return statistics.median(ratios)


def main(argv: list[str]) -> int:
    """Prints the measurements; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_events", type=int, default=1_000_000, help="impressions")
    parser.add_argument("--pairs", type=int, default=3, help="how often both sides are run")
    parser.add_argument("--long_user", action="store_true", help="compare one user with all rows and many users")
    parser.add_argument("--plain_sql", nargs=2, type=pathlib.Path, metavar=("RAW", "OUT"), help="run that side alone")
    args = parser.parse_args(argv)
    if args.plain_sql:
        plain_sql(*args.plain_sql)
        return 0
    with tempfile.TemporaryDirectory(prefix="build_cost_") as folder:
        work = pathlib.Path(folder)
        if args.long_user:
            cpu_s = {}
            for name, num_users in (("one", 1), ("many", max(1, args.num_events // 5))):  # 5 rows each
                draw(work / f"raw_{name}", args.num_events, num_users)
                runs = [run("build", work / f"raw_{name}", work / f"{name}{n}")["cpu_s"] for n in range(args.pairs)]
                cpu_s[name] = statistics.median(runs)
            print(json.dumps(cpu_s | {"ratio": round(cpu_s["one"] / cpu_s["many"], 2)}))
            return 0
        draw(work / "raw", args.num_events, max(1, args.num_events // EVENTS_PER_USER))
        ratio = compare(work / "raw", work, args.pairs)
    print(json.dumps({"num_events": args.num_events, "build / plain_sql": round(ratio, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
