"""Log-odds of earlier days, `--rates`, against plain Python over a log with ties, an empty day and new items."""

import math
import pathlib
import random
import types

import ibis
import pytest

from data_pipeline import counters
from gpsd_dist import schema
from tests.unit.data_pipeline.conftest import DAY_S, make_grocery, manifest_of, rows_of, run
from tests.unit.data_pipeline.test_counters import DAYS, START_S, Log, build
from tests.unit.data_pipeline.test_engines_agree import SPARK, make_taobao, needs_spark

RATES = ("--rates", 20, "--daily_requests")  # every request is of one day, whatever its labels make of histories
NO_CLICK, NOTHING = 4, 6  # days


def day_of(second: int) -> int:
    return second // DAY_S - START_S // DAY_S


@pytest.fixture
def log() -> Log:
    """Exposures of 12 days: one without a click, one without an exposure, and an item of the last two days alone."""
    made, shown = Log(num_shown=200), []
    for user, item, second, click in made.shown:
        day = day_of(second)
        item = "8" if item == "7" and day >= DAYS - 2 else item
        if day != NOTHING:
            shown.append((user, item, second, click * (day != NO_CLICK)))
    made.shown = shown
    return made


def expected(log: Log, number: int) -> float:
    """Looks at all exposures of earlier days, one after the other."""
    _, item, second, _ = log.shown[number]
    clicks = shown = own_clicks = own_shown = 0
    for _, other, other_second, click in log.shown:
        if day_of(other_second) < day_of(second):
            clicks, shown = clicks + click, shown + 1
            own_clicks, own_shown = own_clicks + click * (other == item), own_shown + (other == item)
    rate = (clicks + 1) / (shown + 2)
    return math.log((own_clicks + 20 * rate) / (own_shown - own_clicks + 20 * (1 - rate)))


def numbers(out: pathlib.Path) -> dict[int, float]:
    """{number of an exposure: what the data set has for it}."""
    rows = [row for split in ("train", "valid", "test") for row in rows_of(out, split)]
    return {int(n): x for row in rows for n, x in zip(row["candidate.number"], row["candidate.rates"], strict=True)}


def check(log: Log, out: pathlib.Path) -> None:
    assert numbers(out) == {n: pytest.approx(expected(log, n), rel=1e-6, abs=1e-7) for n in range(len(log.shown))}


def test_every_number_is_that_of_plain_python(log, tmp_path):
    assert build(log.write(tmp_path / "raw"), tmp_path / "out", *RATES) == 0
    check(log, tmp_path / "out")
    found = numbers(tmp_path / "out")
    days = {day: {found[n] for n, row in enumerate(log.shown) if day_of(row[2]) == day} for day in range(DAYS)}
    assert days[0] == {0.0} and not days[NOTHING] and min(len(days[day]) for day in (NO_CLICK, NOTHING + 1)) > 3
    assert [row for row in log.shown if row[1] == "8"] and max(found.values()) - min(found.values()) > 0.5
    feature = manifest_of(tmp_path / "out").feature("rates")
    assert (feature.counts, feature.prior_exposures, feature.log, feature.places) == ("item", 20, False, ("candidate",))


def test_labels_of_a_day_change_no_number_up_to_that_day(log, tmp_path):
    assert build(log.write(tmp_path / "raw"), tmp_path / "out", *RATES) == 0
    before, last = numbers(tmp_path / "out"), DAYS - 2
    at = [n for n, row in enumerate(log.shown) if day_of(row[2]) == last]
    clicks = [log.shown[n][3] for n in at]
    random.Random(1).shuffle(clicks)
    assert clicks != [log.shown[n][3] for n in at]
    for n, click in zip(at, clicks, strict=True):
        log.shown[n] = (*log.shown[n][:3], click)
    assert build(log.write(tmp_path / "raw2"), tmp_path / "out2", *RATES) == 0
    after = numbers(tmp_path / "out2")
    changed = {n for n in before if before[n] != after[n]}
    assert changed and {day_of(log.shown[n][2]) for n in changed} == {last + 1}


def test_an_appended_day_is_that_of_the_whole_log(log, tmp_path):
    assert build(log.write(tmp_path / "raw1", START_S + (DAYS - 2) * DAY_S), tmp_path / "day1", *RATES) == 0
    raw = log.write(tmp_path / "raw2")
    assert build(raw, tmp_path / "day2", "--append_to", tmp_path / "day1", "--num_buckets", 2) == 0
    check(log, tmp_path / "day2")
    assert build(raw, tmp_path / "day3", "--append_to", tmp_path / "day1", "--rates", 5) == 2


@needs_spark
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_number_of_spark_is_that_of_plain_python(log, tmp_path):
    options = (*RATES, "--counts", "3d,total", "--num_buckets", 2)
    assert build(log.write(tmp_path / "raw"), tmp_path / "out", *options, *SPARK) == 0
    check(log, tmp_path / "out")
    assert build(tmp_path / "raw", tmp_path / "duckdb", *options) == 0
    assert numbers(tmp_path / "out") == numbers(tmp_path / "duckdb")


def test_an_exposure_counts_as_in_the_loss():
    """Unknown labels do not; of a conditional task its given ones do; weights and sampled negatives count as often."""
    rows = [("a", 5, 1.0, 1.0, 2.0, 0.5), ("a", 9, 0.0, 1.0, 3.0, 0.5), ("a", DAY_S, 0.0, 1.0, 1.0, 0.1)]
    rows += [("a", 7, 0.0, 0.0, 1.0, 0.5), ("a", 7, None, 1.0, 1.0, 0.5), (None, 7, 1.0, 1.0, 1.0, 0.5)]
    names = ("item_id", "time_s", "buy", "click", "sampling_weight", "sampling_negative_rate")
    exposures = ibis.memtable([dict(zip(names, row, strict=True)) for row in rows])

    def by_day(given: str | None, *sampling: str) -> list[tuple]:
        log = types.SimpleNamespace(tasks=(schema.Task("buy", given),), sampling=sampling, exposures=exposures)
        found = counters._by_day(log).order_by("moment_s").execute()
        return [tuple(row) for row in found[["item_id", "moment_s", "clicks", "others"]].itertuples(index=False)]

    assert by_day(None) == [("a", 0, 1, 2), ("a", DAY_S, 0, 1)]
    assert by_day("click") == [("a", 0, 1, 1), ("a", DAY_S, 0, 1)]
    assert by_day(None, "weight") == [("a", 0, 2, 4), ("a", DAY_S, 0, 1)]
    assert by_day(None, "weight", "negative_rate") == [("a", 0, 2, 3 / 0.5 + 1 / 0.5), ("a", DAY_S, 0, 10)]
    assert by_day("click", "negative_rate") == by_day("click")


def test_a_log_without_labels_and_a_name_that_is_taken_are_refused(log, tmp_path, capsys):
    make_taobao(tmp_path / "events")
    options = ("--raw_dir", tmp_path / "events", "--out_dir", tmp_path / "out", "--rates", 20)
    assert run("--source", "taobao", *options) == 2
    assert "--rates needs exposures with labels, and this log has events alone" in capsys.readouterr().err
    raw = log.write(tmp_path / "raw")
    text = (raw / "schema.toml").read_text()
    (raw / "schema.toml").write_text(text.replace('{ column = "category" }', '{ column = "category", name = "rates" }'))
    assert build(raw, tmp_path / "out", "--rates", 20) == 2
    assert "--counts or --rates makes ['rates']" in capsys.readouterr().err
    assert build(raw, tmp_path / "out", "--rates", -1) == 2


def test_a_source_of_its_own_has_rates(tmp_path):
    """Grocery gives each user one target and one negative on the day of the target."""
    raw = make_grocery(tmp_path / "raw")
    options = ("--out_dir", tmp_path / "out", "--valid_fraction", 0.25, "--rates", 20)
    assert run("--source", "amazon_grocery", "--raw_dir", raw, *options) == 0
    assert [row["candidate.rates"] for row in rows_of(tmp_path / "out", "train")] == [[0.0, 0.0]] * 3
