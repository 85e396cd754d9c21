"""Counts of earlier events, `--counts`, against a count in plain Python over a log that tries every rule."""

import datetime
import pathlib
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import counters
from gpsd_dist import features
from gpsd_dist.data import data_versions
from tests.unit.data_pipeline.conftest import DAY_S, manifest_of, rows_of, run
from tests.unit.data_pipeline.test_engines_agree import SPARK, needs_spark

START_S = int(datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC).timestamp())
DAYS = 12
WINDOWS = {"1h": 3600, "3d": 3 * DAY_S, "total": 0}
SCHEMA = """
[history]
files = "events.csv"
user = "uid"
item = "sku"
time = "at"
time_unit = "iso"
feature = [{ column = "note" }]
[exposure]
files = "shown.parquet"
user = "uid"
item = "sku"
time = "t"
extends_history = "click"
task = [{ column = "click" }]
feature = [{ column = "number", kind = "numerical", place = "candidate" }]
[items]
files = "items.csv"
item = "sku"
feature = [{ column = "category" }, { column = "tags", kind = "bag", separator = "|" }]
[split]
valid_from = 2024-05-08
test_from = 2024-05-09
"""
ITEMS = {"1": "a", "2": "a", "3": "b", "4": "", "5": "b"}  # 4 has no category; 6 and 7 are not in the file
Event = tuple[str, str, int]  # user, item, epoch s


class Log:
    """Events and exposures on few seconds, so that many of them share one; `until_s` cuts the log off."""

    def __init__(self, seed: int = 3, num_users: int = 5, num_events: int = 150, num_shown: int = 150):
        draw = random.Random(seed)
        seconds = [START_S + draw.randrange(DAYS * DAY_S) for _ in range(80)]
        seconds += [s + d for s in seconds[:20] for d in (-1, 1, 3600, 3601, 3 * DAY_S)]
        moments = [s for s in seconds if START_S <= s < START_S + DAYS * DAY_S]

        def draws(count: int) -> list[Event]:
            return [
                (f"u{draw.randrange(num_users)}", str(draw.randrange(1, 8)), draw.choice(moments)) for _ in range(count)
            ]

        self.events = [(*event, draw.choice("xy")) for event in draws(num_events)]
        self.events += self.events[:20]  # the same row again is the same event
        self.shown = [(*event, int(draw.random() < 0.4)) for event in draws(num_shown)]
        self.shown += [(user, item, s, 0) for user, item, s in draws(3)]

    def write(self, raw: pathlib.Path, until_s: int = START_S + DAYS * DAY_S) -> pathlib.Path:
        raw.mkdir()
        (raw / "schema.toml").write_text(SCHEMA)
        (raw / "items.csv").write_text("sku,category,tags\n" + "".join(f"{i},{c},p|q\n" for i, c in ITEMS.items()))
        zone = datetime.timezone(datetime.timedelta(hours=5, minutes=30))
        times = [datetime.datetime.fromtimestamp(s, zone).isoformat() for _, _, s, _ in self.events]
        lines = [f"{u},{i},{at},{n}\n" for (u, i, s, n), at in zip(self.events, times, strict=True) if s < until_s]
        (raw / "events.csv").write_text("uid,sku,at,note\n" + "".join(lines))
        names = ("uid", "sku", "t", "click", "number")
        rows = [dict(zip(names, (*row, n), strict=True)) for n, row in enumerate(self.shown) if row[2] < until_s]
        pq.write_table(pa.Table.from_pylist(rows), raw / "shown.parquet")
        return raw

    def known_events(self) -> list[Event]:
        """Every event once: those of the history, and clicks that it does not have."""
        found = [event[:3] for event in dict.fromkeys(self.events)]
        clicks = dict.fromkeys((u, i, s, n) for n, (u, i, s, click) in enumerate(self.shown) if click)
        return found + [event[:3] for event in clicks if event[:3] not in set(found)]

    def expected(self, number: int, request_s: int) -> dict[str, float]:
        """Counts for the exposure of that number, one event after the other."""
        user, item, *_ = self.shown[number]
        values = {"item": lambda event: event[1], "category": lambda event: ITEMS.get(event[1])}
        found = {}
        for name, value in values.items():
            own = value((user, item, 0))
            for window, size_s in WINDOWS.items():
                from_s = request_s - size_s if size_s else 0
                seen = [e for e in self.known_events() if from_s <= e[2] < request_s and own and value(e) == own]
                found[f"candidate.count_{window}_{name}"] = len(seen)
        midnight_s = request_s // DAY_S * DAY_S
        for window, size_s in WINDOWS.items():
            from_s = midnight_s - size_s if size_s else 0
            seen = [e for e in self.known_events() if from_s <= e[2] < midnight_s and e[0] == user]
            found[f"context.count_{window}_user"] = len(seen)
        return found


def build(raw: pathlib.Path, out: pathlib.Path, *options) -> int:
    return run("--source", "generic", "--raw_dir", raw, "--out_dir", out, *options)


COUNTS = ("--counts", ",".join(WINDOWS), "--user_counts")


def found_in(out: pathlib.Path, split: str) -> dict[int, tuple[int, dict[str, float]]]:
    """{number of an exposure: (request time, its counts)}."""
    found = {}
    for row in rows_of(out, split):
        for place, number in enumerate(row["candidate.number"]):
            names = [name for name in row if ".count_" in name]
            values = {n: row[n][place] if n.startswith("candidate.") else row[n] for n in names}
            found[int(number)] = row["request_time_s"], values
    return found


def check(log: Log, out: pathlib.Path, splits: tuple[str, ...]) -> None:
    found = {number: entry for split in splits for number, entry in found_in(out, split).items()}
    assert len(found) > 5
    wrong = {
        number: (values, log.expected(number, request_s))
        for number, (request_s, values) in found.items()
        if values != log.expected(number, request_s)
    }
    assert not wrong


@pytest.fixture(scope="module")
def log() -> Log:
    return Log()


@pytest.fixture(scope="module")
def built(log, tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("counters")
    assert build(log.write(root / "raw"), root / "out", *COUNTS) == 0
    return root / "out"


def test_every_count_is_that_of_plain_python(log, built):
    check(log, built, ("train", "valid", "test"))
    values = [
        value for split in ("train", "test") for _, row in found_in(built, split).values() for value in row.values()
    ]
    assert 0 in values and max(values) > 20
    feature = manifest_of(built).feature("count_3d_category")
    assert (feature.counts, feature.window_s, feature.log) == ("category", 3 * DAY_S, True)
    assert feature.std > 0 and 1 < len(feature.quantiles) < 16
    assert "count_3d_tags" not in [f.name for f in manifest_of(built).features]


def days_of_requests(log: Log, out: pathlib.Path) -> list[set[int]]:
    """Days of the candidates of each request."""
    rows = [row for split in ("train", "valid", "test") for row in rows_of(out, split)]
    return [{log.shown[int(number)][2] // DAY_S for number in row["candidate.number"]} for row in rows]


def test_daily_requests_end_at_midnight_and_are_otherwise_the_same(log, built, tmp_path):
    assert any(len(days) > 1 for days in days_of_requests(log, built))
    options = (*COUNTS, "--daily_requests", "--num_buckets", 2)
    assert build(log.write(tmp_path / "raw"), tmp_path / "out", *options) == 0
    assert all(len(days) == 1 for days in days_of_requests(log, tmp_path / "out"))
    check(log, tmp_path / "out", ("train", "valid", "test"))
    for split in ("train", "valid", "test"):
        assert set(found_in(tmp_path / "out", split)) == set(found_in(built, split))
        times = [
            log.shown[number][2] // DAY_S == s // DAY_S for number, (s, _) in found_in(tmp_path / "out", split).items()
        ]
        assert all(times)
    assert manifest_of(tmp_path / "out").options["daily_requests"] is True
    other = ("--append_to", built, "--daily_requests")
    assert build(log.write(tmp_path / "raw2"), tmp_path / "day", *other) == 2  # rows are cut as on the first day


@needs_spark
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_count_of_spark_is_that_of_plain_python(log, tmp_path):
    assert build(log.write(tmp_path / "raw"), tmp_path / "out", *COUNTS, *SPARK, "--num_buckets", 2) == 0
    check(log, tmp_path / "out", ("train", "valid", "test"))


def test_an_appended_day_counts_like_the_whole_log(log, tmp_path):
    until_s = START_S + (DAYS - 2) * DAY_S
    assert build(log.write(tmp_path / "raw1", until_s), tmp_path / "day1", *COUNTS) == 0
    raw2 = log.write(tmp_path / "raw2")
    assert build(raw2, tmp_path / "day2", "--append_to", tmp_path / "day1", "--num_buckets", 2) == 0
    check(log, tmp_path / "day2", ("train", "valid", "test"))
    other = ("--append_to", tmp_path / "day1", "--counts", "7d")
    assert build(raw2, tmp_path / "day3", *other) == 2  # windows are those of the first day


def test_no_event_at_or_after_a_request_changes_its_counts(log, built, tmp_path):
    moment_s = START_S + 10 * DAY_S + 3600
    moment_s = max(s for *_, s, _ in log.shown if s <= moment_s)  # an exposure of that very second
    other = Log()
    other.events = [e for e in log.events if e[2] < moment_s] + [("u1", "1", moment_s, "x"), ("u2", "3", moment_s, "y")]
    other.shown = [(u, i, s, 1 - click if s >= moment_s else click) for u, i, s, click in log.shown]
    assert build(other.write(tmp_path / "raw"), tmp_path / "out", *COUNTS) == 0
    before = {n: entry for split in ("train", "valid", "test") for n, entry in found_in(built, split).items()}
    after = {n: entry for split in ("train", "valid", "test") for n, entry in found_in(tmp_path / "out", split).items()}
    early = [n for n, (*_, s, _) in enumerate(log.shown) if s <= moment_s]
    assert sum(log.shown[n][2] == moment_s for n in early) and len(early) < len(before)
    assert {n: before[n] for n in early} == {n: after[n] for n in early}


def test_what_cannot_be_counted_is_refused(log, tmp_path, capsys):
    raw = log.write(tmp_path / "raw")
    assert build(raw, tmp_path / "out", "--counts", "7 days") == 2
    assert "--counts 7 days must be windows such as 7d,30d,total" in capsys.readouterr().err
    assert build(raw, tmp_path / "out", "--user_counts") == 2
    assert "--user_counts goes with --counts" in capsys.readouterr().err


def test_the_counters_of_a_data_set_hold_its_events(log, built):
    folder = data_versions.current(built) / counters.FOLDER
    table = pq.read_table(folder / counters.EVENTS)
    found = {(r["item_id"], r["moment_s"]): r["num"] for r in table.to_pylist()}
    events = log.known_events()
    assert found == {(i, s): sum(e[1:] == (i, s) for e in events) for _, i, s in events}
    latest_s = max(s for *_, s, _ in log.shown + log.events)
    assert int(table.schema.metadata[counters.AS_OF]) == latest_s + 1
    assert pq.read_table(folder / counters.ITEMS).to_pylist()[3] == {"item_id": "4", "category": None}


def test_a_number_is_seen_by_its_logarithm(built):
    feature = manifest_of(built).feature("count_total_item")
    values = np.array([0, 1, 20], np.float32)
    expected = (np.log1p(values) - feature.mean) / feature.std
    np.testing.assert_allclose(features.standardise(feature, values), expected, rtol=1e-6)
    np.testing.assert_allclose(features.logarithm(np.array([-3.0, 0.0])), [-np.log(4), 0.0])
