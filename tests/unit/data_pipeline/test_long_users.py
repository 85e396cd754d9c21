"""A user with many rows costs what as many rows of many users cost."""

import random

import pyarrow.parquet as pq
import pytest

from data_pipeline import engine, sequences
from gpsd_dist.data import data_versions
from tests.assets.cases import logs
from tests.unit.data_pipeline.conftest import manifest_of, run

NUM_ROWS, LIMIT = 400, 7
SCHEMA = (
    '[exposure]\nfiles = "shown.csv"\nuser = "user_id"\nitem = "item_id"\ntime = "ts"\n'
    'task = [{ column = "click" }]\nextends_history = "click"\n'
)


@pytest.fixture
def crawler(tmp_path):
    """Exposures of one user, every other one clicked, and a few of others."""
    draw = random.Random(3)
    rows = [("bot", f"i{draw.randrange(50)}", 1_700_000_000 + 60 * n, n % 2) for n in range(NUM_ROWS)]
    rows += [(f"u{n % 9}", f"i{draw.randrange(50)}", 1_700_000_030 + 97 * n, n % 3 == 0) for n in range(200)]
    rows = [(user, item, ts, int(click)) for user, item, ts, click in rows]
    return rows, logs.write(tmp_path / "raw", SCHEMA, {"shown.csv": logs.lines(rows, "user_id,item_id,ts,click")})


def test_histories_are_the_last_clicks_before_the_request(crawler, tmp_path):
    rows, raw = crawler
    out = tmp_path / "out"
    assert run("--source", "generic", "--raw_dir", raw, "--out_dir", out, "--max_history_length", LIMIT) == 0
    manifest, seen = manifest_of(out), 0
    for split in ("train", "valid", "test"):
        for file in manifest.split(split).files:
            for row in pq.read_table(data_versions.current(out) / file).to_pylist():
                moment = row["request_time_s"]
                clicks = sorted(ts for user, _, ts, click in rows if user == row["user_id"] and click and ts < moment)
                assert row["history.time_s"] == clicks[-LIMIT:]
                seen += 1
    assert seen > 250


def test_no_request_is_joined_with_all_events_of_its_user(crawler, tmp_path, monkeypatch):
    _, raw = crawler
    longest = []
    collect = sequences.user_sequences

    def watched(encoder: sequences.Encoder, events, items, limit: int):
        found = collect(encoder, events, items, limit)
        assert isinstance(encoder.engine, engine.Engine)
        longest.append(int(found.sequence.length().max().execute()))
        return found

    monkeypatch.setattr(sequences, "user_sequences", watched)
    arguments = ("--source", "generic", "--raw_dir", raw, "--out_dir", tmp_path / "out")
    assert run(*arguments, "--max_history_length", LIMIT) == 0
    assert longest == [2 * LIMIT]
