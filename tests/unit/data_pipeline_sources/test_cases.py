"""Raw logs that a build once read wrongly: each is read rightly now, or refused with its reason."""

import datetime
import decimal
import gzip
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import build, write
from gpsd_dist import schema
from gpsd_dist.data import data_versions
from tests.assets.cases import logs
from tests.unit.data_pipeline_sources.conftest import Prepared

RIGHT = (30, 210)
"""Rows and history tokens of pretrain in the plain log."""
ITEMS_LIST = [pa.large_list(pa.large_string()), pa.list_(pa.string(), 2), pa.list_(pa.string_view()), pa.string()]


@pytest.fixture
def make(tmp_path, capsys):
    """make(writer, *arguments) writes that log and builds it: (status, Prepared or None, what was printed)."""

    def run(writer, *arguments, options=()) -> tuple[int, Prepared | None, str]:
        raw, out = writer(tmp_path / "raw", *arguments), tmp_path / "out"
        status = build.main(["--source", "generic", "--raw_dir", str(raw), "--out_dir", str(out), *options])
        printed = capsys.readouterr()
        return status, Prepared(out) if status == 0 else None, printed.out + printed.err

    return run


def size_of(data: Prepared, split: str = "pretrain") -> tuple[int, int]:
    found = data.manifest.split(split)
    return found.num_rows, found.num_history_tokens


def refused(made: tuple[int, Prepared | None, str], *words: str) -> None:
    """The build ended with one line, status 2, that has these words."""
    status, _, printed = made
    assert status == 2
    message = printed[printed.index("error: ") :]
    assert message.count("\n") == 1 and len(message) < 1000
    for word in words:
        assert word in message


READ_WHOLE = {
    "brackets in a name": (logs.names_that_are_patterns,),
    "star in a name": (logs.star_in_a_name,),
    "folder named like a column, CSV": (logs.folder_named_like_a_column, "csv"),
    "folder named like a column, Parquet": (logs.folder_named_like_a_column, "parquet"),
    "hidden copies": (logs.hidden_copies,),
    "mixed line ends": (logs.mixed_line_ends,),
    "column without a name": (logs.column_without_a_name,),
    "an empty shard": (logs.empty_shards,),
    "quotes are letters": (logs.quotes_in_tabs, 'quote = ""\n'),
    "backslashes": (logs.backslashes, "escape = '\\'"),
    "lines in values": (logs.line_ends_in_values,),
}


@pytest.mark.parametrize("name", READ_WHOLE)
def test_every_row_is_read_once(make, name):
    status, data, _ = make(*READ_WHOLE[name])
    assert status == 0 and size_of(data) == RIGHT
    assert {user for (user,) in data.rows("pretrain")} == {str(user) for user in range(101, 131)}
    counted = {entry["path"]: entry["rows"] for entry in data.manifest.sources if "rows" in entry}
    assert sum(counted.values()) == 240


def test_hidden_files_and_empty_shards_are_named(make, tmp_path):
    _, data, printed = make(logs.hidden_copies)
    assert ".ipynb_checkpoints/log-checkpoint.csv" in printed and "_tmp/log.csv" in printed
    assert data.manifest.options["warnings"]
    status, _, printed = make(lambda folder: logs.empty_shards(tmp_path / "empty", True))
    assert status == 2 and "part-7.parquet" in printed and "no rows" in printed


def test_a_name_that_is_also_a_pattern_is_refused(make):
    def writer(folder: pathlib.Path) -> pathlib.Path:
        files = {"log*.csv": logs.lines(logs.events()), "log2.csv": logs.lines(logs.events())}
        return logs.write(folder, logs.HISTORY.replace("log.csv", "log*.csv"), files)

    refused(make(writer), "'log*.csv'", "log2.csv", "[*]")


def test_odd_folders_above_the_raw_files_mean_nothing(make, tmp_path):
    odd = tmp_path / "user_id=alice" / "a'b [x] * ? {1} $é"
    status, data, _ = make(lambda folder: logs.write(odd, logs.HISTORY, {"log.csv": logs.lines(logs.events())}))
    assert status == 0 and size_of(data) == RIGHT


def test_an_output_folder_with_an_odd_name(tmp_path):
    raw = logs.every_event_twice(tmp_path / "raw")
    out = tmp_path / "item_id=7" / "o'ut [1]*? é"
    assert build.main(["--source", "generic", "--raw_dir", str(raw), "--out_dir", str(out)]) == 0
    assert schema.read_manifest(data_versions.current(out)).split("pretrain").num_rows == 30


@pytest.mark.parametrize("keys", ["", 'partition_columns = ["country"]\n'])
def test_folders_are_columns_where_the_schema_asks(make, keys):
    def writer(folder: pathlib.Path) -> pathlib.Path:
        logs.partitions(folder)
        path = folder / "schema.toml"
        path.write_text(path.read_text() + keys)
        return folder

    status, data, _ = make(writer)
    assert status == 0 and size_of(data) == RIGHT
    rows = data.rows("pretrain")
    assert set(rows["101",]["history.country"]) == {"FR"} and set(rows["130",]["history.country"]) == {"D/E"}


def test_a_folder_that_is_missing_is_named(make):
    refused(make(logs.partitions, "region"), "no column 'region'", "country=")


def test_ids_have_one_spelling_in_all_shards(make):
    status, data, _ = make(logs.integer_and_float_shards)
    assert status == 0 and data.manifest.split("pretrain").num_rows == 30
    assert set(data.words["item"].values()) <= {"PAD", "UNKNOWN"} | {str(item) for item in range(1000, 1020)}


def test_ids_that_lost_digits_are_refused(make):
    refused(make(logs.rounded_ids), "'user_id'", "data row 0", "exactly")


def test_ids_of_an_items_file_in_another_spelling(make):
    status, data, printed = make(logs.items_file, "{}.0")
    assert status == 0 and "101.0 are spelled 101" in printed
    assert set(data.words["cat"].values()) == {"PAD", "UNKNOWN", "c0", "c1", "c2"}


def test_seconds_that_are_called_milliseconds(make):
    refused(make(logs.seconds_as_ms), "log.csv", "'ts'", "data row 0", 'time_unit = "s"')


def test_mixed_units_are_found(make):
    refused(make(logs.seconds_as_ms, 4), "'ts'", "data row 0", "(60 such rows)", 'time_unit = "s"')


@pytest.mark.parametrize("suffix", [" UTC", "Z", "+00:00", " GMT", " Etc/UTC", ".000Z"])
def test_a_zone_in_the_text_is_obeyed(make, suffix):
    status, data, _ = make(logs.text_times, suffix)
    times = [row["history.time_s"][0] for row in data.rows("pretrain").values()]
    assert status == 0 and min(times) == logs.events()[0][2]


def test_text_without_a_zone_is_local(make):
    _, data, _ = make(logs.text_times, "")
    assert min(row["history.time_s"][0] for row in data.rows("pretrain").values()) == logs.events()[0][2] - 3600


def test_an_unknown_zone_is_refused(make):
    refused(make(logs.text_times, " PST"), "'ts'", "PST", "zone")


@pytest.mark.parametrize("unit", ["ms", "s", "us"])
def test_parts_of_a_second_order_events(make, unit):
    status, data, _ = make(logs.parts_of_a_second, unit)
    assert status == 0
    assert data.rows("pretrain")["u3",]["history.item"] == [f"i{30 + step}" for step in range(7)]


def test_native_times_need_no_unit(make):
    def writer(folder: pathlib.Path) -> pathlib.Path:
        moments = pa.array([ts * 1000 for _, _, ts in logs.events()], pa.timestamp("ms"))
        schema = logs.HISTORY.replace("log.csv", "log.parquet")
        return logs.write(folder, schema, {"log.parquet": logs.table(logs.events(), ts=moments)})

    status, data, _ = make(writer)
    times = [row["history.time_s"][0] for row in data.rows("pretrain").values()]
    assert status == 0 and min(times) == logs.events()[0][2]


@pytest.mark.parametrize("word", ["1e308", "18446744073709551615", "-5", "soon"])
def test_a_time_that_is_none(make, word):
    refused(make(logs.time_too_large, word), "log.csv", "'ts'", "data row 240", word)


def test_a_forgotten_unit_of_text(make):
    refused(make(logs.time_too_large, "2024-05-01 10:00:00"), "data row 240", 'time_unit = "iso"')


def test_quotes_that_join_rows_are_refused(make):
    refused(make(logs.quotes_in_tabs), "log.tsv, line 5", "line 42", 'quote = ""')


def test_backslashes_are_named(make):
    refused(make(logs.backslashes), "log.csv, line 5", "escape")


def test_values_behind_backslashes(make):
    _, data, printed = make(logs.backslashes, "escape = '\\'")
    titles = data.rows("pretrain")["101",]["history.title"]
    assert titles[3:6] == ['24" screen, used', "plain", "C:\\"]
    assert "1 values '\\\\N' are read as missing" in printed


def test_line_ends_in_values_are_counted(make):
    _, data, printed = make(logs.line_ends_in_values)
    assert data.rows("pretrain")["101",]["history.title"][0] == 'two\nlines, "quoted"'
    assert "27 rows hold a line end inside of quotes" in printed


@pytest.mark.parametrize("word", ["nan", "NULL", "\\N"])
def test_missing_users_are_left_out(make, word):
    status, data, printed = make(logs.word_for_missing_users, word)
    assert status == 0 and size_of(data)[0] == 30
    assert data.manifest.skipped["history rows without user_id"] == 48
    assert f"48 values {word!r} are read as missing" in printed


def test_words_for_missing_values_can_be_chosen(make):
    _, data, printed = make(logs.word_for_missing_users, "None")
    assert ("None",) in data.rows("pretrain") and "48 values 'None' are taken as an id" in printed
    _, data, _ = make(logs.word_for_missing_users, "None", '[csv]\nnull_words = ["None"]\n')
    assert ("None",) not in data.rows("pretrain")


def test_rows_that_repeat_another_count_once(make):
    status, data, _ = make(logs.every_event_twice)
    assert status == 0 and size_of(data) == RIGHT
    assert data.manifest.skipped["history rows that repeat another (`keep_copies` keeps them)"] == 240
    assert size_of(make(logs.every_event_twice, "keep_copies = true\n")[1]) == (30, 450)


def test_the_latest_attribute_that_is_there_counts(make):
    _, data, _ = make(logs.attributes_end)
    items = data.path / "items.parquet"
    import pyarrow.parquet as pq

    found = pq.read_table(items).to_pydict()
    raw = {data.words["item"][index]: data.words["cat"][cat] for index, cat in zip(found["index"], found["cat"])}
    assert raw == {str(item): f"c{item % 3}" for item in range(1000, 1020) if str(item) in raw} and len(raw) >= 19


@pytest.mark.parametrize("kind", ITEMS_LIST, ids=str)
def test_every_kind_of_list_is_a_bag(make, kind):
    status, data, _ = make(logs.lists_of, kind)
    assert status == 0 and set(data.words["tags"].values()) == {"PAD", "UNKNOWN"} | {f"t{n}" for n in range(5)}


def test_columns_that_differ_in_case(make):
    status, data, _ = make(logs.columns_that_differ_in_case, ("shop", "kind"))
    assert status == 0
    row = data.rows("pretrain")["101",]
    assert {word[0] for word in row["history.shop"]} == {"a"} and {word[0] for word in row["history.kind"]} == {"b"}


@pytest.mark.parametrize(
    "names", [("Cat", "cat"), ("Rank", "cat"), ("Item", "cat"), ("ORDER", "cat"), ("a" * 300, "b")]
)
def test_names_are_checked_without_regard_to_case(make, names):
    refused(make(logs.columns_that_differ_in_case, names), "schema.toml", names[0][:40], "`name`")


def test_nan_is_missing(make):
    status, data, printed = make(logs.number_column, "NaN")
    assert status == 0 and "35 values 'NaN' are read as missing" in printed
    assert data.rows("pretrain")["101",]["history.price"][:2] == [0.0, 4.5]


@pytest.mark.parametrize(
    ("word", "advice"), [("inf", "finite"), ("-Infinity", "finite"), ("1e999", "finite"), ("x", "")]
)
def test_numbers_that_are_none(make, word, advice):
    refused(make(logs.number_column, word), "log.txt", "'price'", "data row 0", word, advice)


def test_decimal_commas(make):
    refused(make(logs.number_column, '"4,5"'), "'price'", "'4,5'", 'decimal = ","')
    _, data, _ = make(logs.number_column, '"4,5"', '[csv]\ndecimal = ","\n')
    assert data.rows("pretrain")["101",]["history.price"][0] == 4.5


@pytest.mark.parametrize(("kind", "word"), [("flipped", "CRC"), ("cut", "gzip"), ("long", "longer than 2 MB")])
def test_broken_archives(make, kind, word):
    refused(make(logs.broken_archive, kind), "log.csv.gz", word)


def test_items_that_never_join_are_refused(make):
    made = make(logs.items_file, "0000{}")
    refused(made, "0 of 20 items of the log are in [items]", "leading zeros", "--allow_empty")
    status, data, printed = make(logs.items_file, "0000{}", options=["--allow_empty"])
    assert status == 0 and size_of(data) == RIGHT and "warning: 0 of 20 items" in printed


def test_a_task_without_labels_is_refused(make):
    refused(make(logs.exposures, "no buys"), "task 'buy' has 0 observed labels in train")


def test_a_split_with_one_class_is_named(make):
    status, data, _ = make(logs.exposures, "one class")
    assert status == 0
    (warning,) = [text for text in data.manifest.options["warnings"] if "'click'" in text]
    assert "split 'valid'" in warning and ", 0 positive" in warning and "AUC is not defined" in warning


def test_words_are_labels(make):
    _, words, _ = make(logs.exposures, "click words")
    found = {key: row["label.click"] for key, row in words.rows("test").items()}
    _, numbers, _ = make(logs.exposures, "")
    assert found == {key: row["label.click"] for key, row in numbers.rows("test").items()}


def test_a_click_in_both_logs_counts_once(make):
    status, data, _ = make(logs.clicks_in_both_logs)
    assert status == 0
    reason = "exposures that extend the history and are in [history] already (they count once)"
    assert data.manifest.skipped[reason] > 100
    for row in data.rows("pretrain").values():
        events = list(zip(row["history.item"], row["history.time_s"]))
        assert len(events) == len(set(events))


def test_a_split_without_rows_is_refused(make):
    def writer(folder: pathlib.Path) -> pathlib.Path:
        return logs.write(folder, logs.HISTORY, {"log.csv": logs.lines(logs.events()[:16])})

    refused(make(writer), "split 'test' has no rows", "--allow_empty")
    assert make(writer, options=["--allow_empty"])[0] == 0


@pytest.mark.parametrize("value", [1e9, -1e9])
def test_a_rare_flag_and_wide_numbers_are_left_alone(tmp_path, value):
    flag, wide = [0.0] * 999 + [1.0], np.exp(np.random.default_rng(0).normal(size=1000)).tolist()
    wide.append(value)
    flag.append(0.0)
    pq.write_table(pa.table({"context.flag": flag, "context.wide": wide}), tmp_path / "t.parquet")
    assert write._bounds(tmp_path, ("t.parquet",), "context.flag", is_log=False)[:2] == (None, None)
    low, high, _ = write._bounds(tmp_path, ("t.parquet",), "context.wide", is_log=False)
    assert (low is None) == (value > 0) and (high is None) == (value < 0)
    assert (high or -low) > 20 and sum(entry > (high or 100) for entry in wide[:1000]) <= 1


def test_one_far_number_is_named_and_can_be_cut_off(make):
    _, data, printed = make(logs.one_far_number)
    price = data.manifest.feature("price")
    assert (price.low, price.high) == (None, 9 + 3 * 9) and 3 < price.mean < 7 and 2 < price.std < 5
    assert "history.price: a model sees it from ... to 36" in printed
    assert any(1e9 in row["history.price"] for row in data.rows("pretrain").values())
    _, data, printed = make(logs.one_far_number, ", clip_quantile = 0.01")
    prices = {price for row in data.rows("pretrain").values() for price in row["history.price"]}
    assert prices == {0.0, *map(float, range(1, 10))} and "a model sees" not in printed
    refused(make(logs.one_far_number, ", clip_quantile = 0.6"), "history.feature[0].clip_quantile", "0.6")


@pytest.mark.parametrize("has_time", [True, False])
def test_logs_that_know_the_order_only(make, has_time):
    status, data, printed = make(logs.order_only, has_time)
    assert status == 0 and "1990" not in printed
    items = [str(item) for user, item, _ in logs.events() if user == 103]
    assert data.rows("pretrain")["103",]["history.item"] == items[:-1]
    (test,) = [row for (user, _), row in data.rows("test").items() if user == "103"]
    assert test["candidate.item"][test["label.click"].index(1.0)] == items[-1]
    assert data.manifest.split("valid").num_rows == 0


def test_all_items_can_have_an_index(make):
    def writer(folder: pathlib.Path) -> pathlib.Path:
        logs.items_file(folder, "{}")
        with (folder / "items.csv").open("a") as file:
            file.write("never-seen,c9\n")
        with (folder / "schema.toml").open("a") as file:
            file.write('[options]\nvocabulary = "all_items"\n')
        return folder

    assert "never-seen" in make(writer)[1].words["item"].values()


def test_dates_of_the_split_are_answered_in_dates(make):
    def writer(folder: pathlib.Path) -> pathlib.Path:
        logs.exposures(folder, "")
        path = folder / "schema.toml"
        split = '[split]\ntime_zone = "Asia/Tokyo"\nvalid_from = 2020-01-01\ntest_from = 2020-01-02\n'
        path.write_text(path.read_text().partition("[split]")[0] + split)
        return folder

    refused(make(writer), "from 2023-11-15T07:13:20+09:00", "valid from 2020-01-01T00:00:00+09:00")


def test_files_of_another_kind_than_stated(make):
    def writer(folder: pathlib.Path, content: str | bytes) -> pathlib.Path:
        return logs.write(folder, logs.HISTORY, {"log.csv": content})

    refused(make(writer, logs.lines(logs.events(), separator=";")), "user_id;item_id;ts", "`separator` in [csv]")
    refused(make(writer, gzip.compress(logs.lines(logs.events()).encode())), "log.csv, line 1", "end with .gz")
    refused(make(writer, logs.lines(logs.events()).encode("utf-16")), "log.csv, line 1", "UTF-8")
    refused(make(writer, logs.lines(logs.events()) + "1,2\n"), "log.csv, line 242", "found 2 fields, expected 3")


def test_times_with_and_without_a_zone_are_named(make):
    def writer(folder: pathlib.Path) -> pathlib.Path:
        logs.text_times(folder, "")
        path = folder / "log.csv"
        path.write_text(path.read_text().replace(":13\n", ":13Z\n"))
        return folder

    assert "times name no zone and are taken as Europe/Paris" in make(writer)[2]


def test_a_folder_stands_for_its_files(make):
    def writer(folder: pathlib.Path) -> pathlib.Path:
        half = logs.events()[:120], logs.events()[120:]
        files = {"log/a.csv": logs.lines(half[0]), "log/b/c.csv": logs.lines(half[1]), "log/notes.md": "x"}
        return logs.write(folder, logs.HISTORY.replace("log.csv", "log"), files)

    status, data, printed = make(writer)
    assert status == 0 and size_of(data) == RIGHT and "log/notes.md" in printed


USERS = [user for user, _, _ in logs.events()]
TIMES = [moment for *_, moment in logs.events()]
PLAIN = {
    "a header with a mark": (logs.csv_log, str, "\ufeffuser_id,item_id,ts"),
    "two columns of one name": (logs.csv_log, str, "user_id,item_id,ts,x,x", (1, 2)),
    "negative ids": (logs.csv_log, lambda u: -u),
    "spaces behind ids": (logs.csv_log, lambda u: f"{u} \t" if u % 2 else f"\u00a0{u}"),
    "ids of 26 digits": (logs.csv_log, lambda u: u + 10**25),
    "ids of 26 digits in JSON": (logs.json_log, lambda u: u + 10**25),
    "numbers and texts in JSON": (logs.json_log, lambda u: str(u) if u % 2 else u),
    "unsigned ids": (logs.parquet_log,),
    "decimal ids": (logs.parquet_log,),
    "dictionaries": (logs.parquet_log,),
    "nested columns beside": (logs.parquet_log,),
}
COLUMNS = {
    "unsigned ids": {"user_id": pa.array([user + 2**63 for user in USERS], pa.uint64())},
    "decimal ids": {"user_id": pa.array([decimal.Decimal(user) for user in USERS], pa.decimal128(30, 2))},
    "dictionaries": {"user_id": pa.array([str(user) for user in USERS]).dictionary_encode()},
    "nested columns beside": {"extra": [{"a": 1, "b": [1, 2]}] * len(USERS)},
}


@pytest.mark.parametrize("name", PLAIN)
def test_odd_spellings_of_the_plain_log_are_read(make, name):
    write_log, *arguments = PLAIN[name]
    status, data, _ = make(lambda folder: write_log(folder, *arguments, **COLUMNS.get(name, {})))
    assert status == 0 and size_of(data) == RIGHT and data.manifest.table("item").num_rows == 2 + logs.NUM_ITEMS


def test_empty_user_ids_are_missing(make):
    status, data, _ = make(logs.json_log, lambda u: " " if u == 103 else u)
    assert status == 0 and data.manifest.split("pretrain").num_rows == 29
    assert data.manifest.skipped["history rows without user_id"] == 8


def test_times_of_several_offsets_are_one_order(make):
    def writer(folder: pathlib.Path) -> pathlib.Path:
        zones = [datetime.timezone(datetime.timedelta(hours=hours)) for hours in (-5, 0, 9)]
        words = [datetime.datetime.fromtimestamp(t, zones[n % 3]).isoformat() for n, t in enumerate(TIMES)]
        logs.parquet_log(folder, ts=words)
        (folder / "schema.toml").write_text((folder / "schema.toml").read_text() + 'time_unit = "iso"\n')
        return folder

    _, data, _ = make(writer)
    assert sorted(t for row in data.rows("pretrain").values() for t in row["history.time_s"]) == sorted(
        t for n, t in enumerate(TIMES) if n % 8 < 7
    )


ODD = {
    "an object for an id": (logs.json_log, (lambda u: {"id": u},), ["'user_id', data row 0", "expected a text or a"]),
    "a list for an id": (logs.json_log, (lambda u: [u],), ["'user_id', data row 0", "at the top level"]),
    "bytes of 0": (logs.csv_log, (lambda u: f"1\0{u}",), ["log.csv holds a byte 0", "UTF-16"]),
}
ODD_COLUMNS = {
    "float32 times": ({"ts": pa.array([float(t) for t in TIMES], pa.float32())}, ["'ts'", "float", "7 digits"]),
    "durations": ({"ts": pa.array(TIMES, pa.duration("s"))}, ["'ts'", "found duration[s]", "an epoch time in s"]),
    "times of a day": ({"ts": pa.array([t % 86400 for t in TIMES], pa.time32("s"))}, ["'ts'", "found time32"]),
    "a struct": ({"user_id": [{"a": user} for user in USERS]}, ["'user_id'", "found struct", "columns of their own"]),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_id_is_refused(make, name):
    write_log, arguments, words = ODD[name]
    refused(make(write_log, *arguments), *words)


@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_columns_of_other_types_are_refused(make, name):
    columns, words = ODD_COLUMNS[name]
    refused(make(lambda folder: logs.parquet_log(folder, **columns)), "log.parquet", *words)


def test_keys_inside_of_objects_are_not_read(make):
    def writer(folder: pathlib.Path) -> pathlib.Path:
        logs.json_log(folder, lambda u: {"id": u})
        path = folder / "schema.toml"
        path.write_text(path.read_text().replace('"user_id"', '"user_id.id"'))
        return folder

    refused(make(writer), "no line has the key 'user_id.id'", "keys inside of objects are not read")


def test_letters_that_nobody_sees_are_named(make):
    _, _, printed = make(logs.csv_log, lambda u: f"{u}\u200b" if u % 2 else u)
    assert "120 values hold letters that nobody sees" in printed
