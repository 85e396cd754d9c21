import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import build
from tests.assets.cases import logs

SCHEMA = """
[history]
files = "events/*.csv"
user = "uid"
item = "sku"
time = "ts"
time_unit = "ms"
event = "action"
event_types = ["view", "buy"]
feature = [{ column = "action" }, { column = "seconds", kind = "numerical" }]

[exposure]
files = "shown.jsonl"
user = "uid"
item = "sku"
time = "at"
time_unit = "iso"
request = "page"
extends_history = "click"
task = [{ column = "click" }, { column = "bought", name = "buy", given = "click" }]
feature = [{ column = "slot", place = "candidate" }, { column = "device", place = "context" }]

[items]
files = "items.csv"
item = "sku"
feature = [
  { column = "kind", name = "category" },
  { column = "tags", kind = "bag", separator = "|" },
  { column = "price", kind = "numerical" },
]

[users]
files = "users.parquet"
user = "uid"
feature = [{ column = "city" }, { column = "age", kind = "numerical" }]

[split]
time_zone = "Asia/Shanghai"
valid_from = 2024-01-02
test_from = 2024-01-03

[options]
max_history_length = 3
"""
# 2024-01-01 00:00 UTC+8 is 1704038400
EVENTS_1 = "uid,sku,action,ts,seconds\na,x,view,1704038401000,1.5\na,y,cart,1704038402000,\nb,z,view,1704038400000,2\n"
EVENTS_2 = "uid,sku,action,ts,seconds\na,y,buy,1704038401999,\n,x,view,1704038401000,1\na,z,view,1704124000000,7\n"
_SHOWN_NAMES = ("uid", "sku", "at", "page", "click", "bought", "slot", "device")
SHOWN = "".join(
    json.dumps(dict(zip(_SHOWN_NAMES, row))) + "\n"
    for row in [
        ("a", "x", "2024-01-01T00:00:05", 1, 1, 0, "top", "pc"),
        ("a", "z", "2024-01-01T00:00:06", 1, 0, None, "low", "pc"),
        ("b", "x", "2023-12-31T16:00:09Z", 2, 0, None, "top", "tv"),
        ("a", "new", "2024-01-02T12:00:00+08:00", 3, 1, 1, "top", "pc"),
        ("b", "z", "2024-01-03 00:00:00", 4, 0, None, "far", "pc"),
    ]
)
ITEMS = "sku,kind,tags,price\nx,K1,red|blue,1.5\ny,K1,,2\nz,K2,red,\nnew,K9,green,4\n"


@pytest.fixture
def shop(raw, tmp_path):
    raw("schema.toml", SCHEMA)
    raw("events/1.csv", EVENTS_1)
    raw("events/2.csv", EVENTS_2)
    raw("shown.jsonl", SHOWN)
    raw("items.csv", ITEMS)
    pq.write_table(
        pa.table({"uid": ["a", "b"], "city": ["P", None], "age": [30, 40]}), tmp_path / "raw" / "users.parquet"
    )
    return raw


def test_every_kind_of_column_reaches_its_place(shop, prepare):
    data = prepare("generic")
    train = data.rows("train")
    assert set(train) == {("a", 1704038405), ("b", 1704038409)}
    row = train["a", 1704038405]
    assert row["history.item"] == ["x", "y"]  # the cart event is of a type that does not count
    assert row["history.action"] == ["view", "buy"]
    assert row["history.seconds"] == [1.5, 0.0]
    assert row["history.time_s"] == [1704038401, 1704038401]  # tie: file 1 before file 2
    assert row["history.category"] == ["K1", "K1"]
    assert [sorted(tags) for tags in row["history.tags"]] == [["blue", "red"], ["UNKNOWN"]]
    assert row["candidate.item"] == ["x", "z"]  # one page, one request
    assert row["candidate.slot"] == ["top", "low"]
    assert row["candidate.price"] == [1.5, 0.0]
    assert row["label.click"] == [1.0, 0.0]
    assert row["label.buy"] == [0.0, None]
    assert row["context.device"] == "pc"
    assert row["context.city"] == "P"
    assert row["context.age"] == 30.0
    assert train["b", 1704038409]["context.city"] == "UNKNOWN"
    assert data.manifest.skipped["history rows of other event types"] == 1
    assert data.manifest.skipped["history rows without user_id"] == 1
    _check_later_splits(data)


@pytest.mark.parametrize("options", [(), ("--daily_requests",)], ids=["", "daily"])
def test_a_feature_may_have_the_name_of_any_column_that_is_not_reserved(shop, prepare, options):
    """A page of two slots stays one request, whether or not requests end at midnight."""
    shop("schema.toml", SCHEMA.replace('{ column = "slot", ', '{ column = "slot", name = "request_day", '))
    data = prepare("generic", *options)
    assert data.rows("train")["a", 1704038405]["candidate.request_day"] == ["top", "low"]


def _check_later_splits(data):
    """Clicked exposures extend later histories, and times have zones."""
    ((key, valid),) = data.rows("valid").items()
    assert key == ("a", 1704168000)
    assert valid["history.item"] == ["y", "x", "z"]  # the three latest of x, y, x (clicked), z
    assert valid["history.action"] == ["buy", "UNKNOWN", "view"]
    assert valid["candidate.item"] == ["UNKNOWN"]  # first seen after training
    assert valid["candidate.category"] == ["UNKNOWN"]
    assert valid["label.buy"] == [1.0]
    ((key, test),) = data.rows("test").items()
    assert key == ("b", 1704211200)
    assert test["candidate.slot"] == ["UNKNOWN"]
    assert data.rows("pretrain")["a",]["history.item"] == ["y", "x", "z"]
    assert data.manifest.tasks[1].given == "click"


LABELLESS = """
[history]
files = "log.parquet"
user = "u"
item = "i"
time = "t"
feature = []
[items]
feature = [{ column = "cat" }, { column = "tags", kind = "bag" }]
[split]
rule = "leave_last_out"
[options]
num_negatives = 2
"""


def test_without_exposures_negatives_are_drawn_and_attributes_come_from_the_log(raw, prepare, tmp_path):
    raw("schema.toml", LABELLESS)
    users = [user for user in "abcdef" for _ in range(4)]
    items = [f"i{(number + step) % 6}" for number in range(6) for step in range(4)]
    log = {
        "u": users,
        "i": items,
        "t": list(range(24)),
        "cat": [f"c{item}" for item in items],
        "tags": [["t", item] for item in items],
    }
    pq.write_table(pa.table(log), tmp_path / "raw" / "log.parquet")
    data = prepare("generic")
    for split, step in (("train", 1), ("valid", 2), ("test", 3)):
        rows = data.rows(split)
        assert len(rows) == 6
        for number, user in enumerate("abcdef"):
            row = rows[user, 4 * number + step]
            history = items[4 * number : 4 * number + step]
            assert row["history.item"] == history
            assert row["label.click"][row["candidate.item"].index(items[4 * number + step])] == 1.0
            assert sum(row["label.click"]) == 1.0
            assert len(row["candidate.item"]) == 3
            negatives = [item for item, label in zip(row["candidate.item"], row["label.click"]) if not label]
            assert not set(negatives) & set(items[4 * number : 4 * number + step + 1])
            assert row["history.cat"] == [f"c{item}" for item in history]


def test_fractions_cut_the_exposures_by_time(shop, read_log):
    shop(
        "schema.toml",
        SCHEMA.replace("valid_from = 2024-01-02\ntest_from = 2024-01-03", "valid_fraction = 0.2\ntest_fraction = 0.2"),
    )
    split = read_log("generic").split
    assert (split.valid_from_s, split.test_from_s) == (1704168000, 1704211200)


def test_a_later_log_is_bounded_by_test_until(shop, read_log):
    shop(
        "schema.toml",
        SCHEMA.replace("test_from = 2024-01-03", 'test_from = 2024-01-03\ntest_until = "2024-01-04T00:00:00+08:00"'),
    )
    assert read_log("generic").split.test_until_s == 1704211200 + 86400


CHANGES = {
    "missing column": ("items.csv", ITEMS.replace("kind", "sort"), ["items.csv", "'kind'", "sort"]),
    "wrong type": ("items.csv", ITEMS.replace("1.5", "cheap"), ["items.csv", "'price'", "row 0", "'cheap'", "float64"]),
    "wrong time": (
        "events/2.csv",
        EVENTS_2.replace("1704124000000", "soon"),
        ["2.csv", "'ts'", "row 2", "'soon'", "epoch time in ms"],
    ),
    "wrong unit": (
        "events/2.csv",
        EVENTS_2.replace("1704124000000", "1704124000000000000"),
        ["2.csv", "'ts'", "time_unit"],
    ),
    "wrong iso": (
        "shown.jsonl",
        SHOWN.replace("2024-01-02T12", "yesterday"),
        ["shown.jsonl", "'at'", "row 3", "yesterday"],
    ),
    "label": ("shown.jsonl", SHOWN.replace('"click": 0', '"click": 2', 1), ["shown.jsonl", "'click'", "row 1", "2"]),
    "no json": ("shown.jsonl", SHOWN + "{oops\n", ["shown.jsonl", "row 5", "JSON object", "oops"]),
    "missing key": ("shown.jsonl", SHOWN.replace('"slot"', '"place"'), ["shown.jsonl", "'slot'", "place"]),
    "conflict": ("items.csv", ITEMS + "x,K2,red,3\n", ["items.csv", "'x'", "several"]),
    "empty file": ("items.csv", "", ["items.csv", "empty"]),
    "header only": ("items.csv", "sku,kind,tags,price\n", ["items.csv", "no row in 1 file"]),
    "truncated": ("users.parquet", b"PAR1 and then nothing", ["users.parquet", "truncated"]),
    "types": ("schema.toml", SCHEMA.replace('"view", "buy"', '"click"'), ["event_types", "'click'", "view"]),
    "no file": ("schema.toml", SCHEMA.replace("items.csv", "goods.csv"), ["goods.csv", "items.csv"]),
    "outside": ("schema.toml", SCHEMA.replace('"items.csv"', '"../items.csv"'), ["../items.csv", "leaves the folder"]),
    "ending": ("schema.toml", SCHEMA.replace("items.csv", "schema.toml"), ["schema.toml", "ending"]),
    "boundaries": ("schema.toml", SCHEMA.replace("2024-01-03", "2024-01-01"), ["do not ascend"]),
    "empty train": (
        "schema.toml",
        SCHEMA.replace("2024-01-02", "2023-01-02"),
        ["so that train is empty", "the latest 10 % are test"],
    ),
    "text bag": ("schema.toml", SCHEMA.replace(', separator = "|"', ""), ["items.csv", "'tags'", "separator"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_bad_input_is_named(shop, read_log, name):
    file, content, words = CHANGES[name]
    shop(file, content)
    with pytest.raises(ValueError) as error:
        read_log("generic")
    for word in words:
        assert word in str(error.value)


def test_missing_schema_and_folder_are_named(read_log, tmp_path):
    with pytest.raises(ValueError, match=r"schema\.toml does not exist"):
        read_log("generic")


def _sampling(data, split="train"):
    """(label, weight, rate) of every candidate, by time."""
    rows = sorted(data.rows(split).values(), key=lambda row: row["request_time_s"])
    columns = ("label.click", "sampling.weight", "sampling.negative_rate")
    return [values for row in rows for values in zip(*(row[name] for name in columns))]


def test_weights_and_rates_go_with_their_candidates(prepare, tmp_path):
    w, rate = [1 + n / 1024 for n in range(240)], [(0.5, 0.25)[n % 2] for n in range(240)]
    logs.weighted(tmp_path / "raw", w=w, r=rate)
    data = prepare("generic")
    assert data.manifest.sampling == ("weight", "negative_rate")
    expected = {weight: (float(n % 3 > 0), rate[n]) for n, weight in enumerate(w)}
    found = [entry for split in ("train", "valid", "test") for entry in _sampling(data, split)]
    assert sorted(weight for _, weight, _ in found) == w
    assert all(expected[weight] == (label, kept) for label, weight, kept in found)


def test_a_rate_may_be_a_number(prepare, tmp_path):
    logs.weighted(tmp_path / "raw", 'weight = "w"\nnegative_sampling_rate = 0.125\n')
    assert {rate for _, _, rate in _sampling(prepare("generic"))} == {0.125}


def test_rows_that_differ_in_weight_are_no_copies(prepare, tmp_path):
    logs.weighted(tmp_path / "raw", user_id=["1"] * 240, item_id=["2"] * 240, ts=[10**9 + n // 2 for n in range(240)])
    skipped = prepare("generic", "--allow_empty").manifest.skipped
    assert not any("repeat" in reason for reason in skipped), skipped


def _tokens(data, user):
    """(item, action) of the longest history of a user in test."""
    rows = [row for (name, _), row in data.rows("test").items() if name == user]
    row = max(rows, key=lambda row: row["history_length"])
    return list(zip(row["history.item"], row["history.action"]))


def test_several_labels_bring_events_of_their_own(prepare, tmp_path):
    logs.two_labels(tmp_path / "raw")
    data = prepare("generic")
    last = logs.NUM_USERS * logs.NUM_EVENTS - logs.NUM_EVENTS  # exposures of the last user
    expected = []
    for n in range(last, last + logs.NUM_EVENTS):  # in every three, one was skipped, one bought, one clicked
        expected += [(str(1000 + n % logs.NUM_ITEMS), task) for task in ((), ("click", "buy"), ("click",))[n % 3]]
    assert _tokens(data, "130") == expected[: len(_tokens(data, "130"))] and ("1012", "buy") in expected
    assert sorted(data.words["action"].values()) == ["PAD", "UNKNOWN", "buy", "click"]


@pytest.mark.parametrize("has_actions", [True, False])
def test_events_of_the_history_keep_their_action(prepare, tmp_path, has_actions):
    keys = 'feature = [{ column = "what", name = "action" }]\n' if has_actions else "feature = []\n"
    logs.two_labels(tmp_path / "raw", keys)
    data = prepare("generic")
    word, other = ("view", "click") if has_actions else ("history", "history")
    row = data.rows("pretrain")["101",]
    assert list(zip(row["history.item"], row["history.action"]))[:3] == [
        ("2000", word),
        ("1000", word),
        ("1001", other),
    ]
    assert ("1001", "buy") in zip(row["history.item"], row["history.action"])
    reason = "exposures that extend the history and are in [history] already (they count once)"
    assert data.manifest.skipped.get(reason) == (1 if has_actions else None)


WRONG_SAMPLING = {
    "negative weight": ("w", [-1.0] + [1.0] * 239, "'w', data row 0: found '-1.0'"),
    "no weight": ("w", [1.0, None] + [1.0] * 238, "'w', data row 1: found 'None', expected 0, or a number from 1e-09"),
    "too large a weight": ("w", [1e38] + [1.0] * 239, "'w', data row 0: found '1e+38', expected 0, or a number from"),
    "weight of 0 in float32": ("w", [1e-50] + [1.0] * 239, "'w', data row 0: found '1e-50', expected 0, or a"),
    "rate of 0": (
        "r",
        [0.0] + [1.0] * 239,
        "'r', data row 0: found '0.0', expected a number above 0 (from 1e-09), at most 1",
    ),
    "label of 2": ("click", [2] + [1, 0] * 119 + [1], "true, false, or nothing (1 such rows); correct the values"),
    "rate of the label": ("r", [0.1 if n % 3 == 0 else 1.0 for n in range(240)], "it would give the label away"),
    "nearly the label": ("r", [0.1 if n % 3 == 0 else 0.1 + 0.3 * (n > 9) for n in range(240)], "tells the rows where"),
}


@pytest.mark.parametrize("name", WRONG_SAMPLING)
def test_weights_and_rates_that_cannot_be_are_named(read_log, tmp_path, name):
    column, values, words = WRONG_SAMPLING[name]
    logs.weighted(tmp_path / "raw", **{column: values})
    with pytest.raises(ValueError, match=re.escape(words)):
        read_log("generic")


def test_weights_of_0_alone_are_no_labels(tmp_path, capsys):
    logs.weighted(tmp_path / "raw", w=[0.0] * 240)
    arguments = ["--source", "generic", "--raw_dir", str(tmp_path / "raw"), "--out_dir", str(tmp_path / "out")]
    assert build.main(arguments) == build.MISTAKE
    assert "task 'click' has 0 observed labels in train with a weight above 0" in capsys.readouterr().err


def _two_shards(raw, keys_of_second: tuple[str, ...]):
    raw("schema.toml", LABELLESS.replace("log.parquet", "*.jsonl").replace(', { column = "tags", kind = "bag" }', ""))
    for name, keys in (("1.jsonl", ("u", "i", "t", "cat")), ("2.jsonl", keys_of_second)):
        rows = [{"u": f"{name[0]}{n % 6}", "i": f"i{n % 5}", "t": 10**9 + n, "cat": f"c{n % 2}"} for n in range(24)]
        raw(name, "".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows))


def test_a_key_that_a_whole_shard_lacks_is_null_there(raw, prepare, capsys):
    _two_shards(raw, ("u", "i", "t"))
    assert prepare("generic").manifest.split("pretrain").num_rows == 12
    assert "2.jsonl has the key 'cat' (1 of 2 files): it is missing there" in capsys.readouterr().out


def test_ids_that_a_whole_shard_lacks_are_refused(raw, read_log):
    _two_shards(raw, ("u", "t", "cat"))
    with pytest.raises(ValueError, match=r"2\.jsonl: no line has the key 'i'"):
        read_log("generic")


@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_handful_of_rows_is_said_to_be_too_few(read_log, tmp_path, num_rows):
    path = logs.shown(tmp_path / "raw", 'extends_history = "click"\n') / "shown.parquet"
    pq.write_table(pq.read_table(path).slice(2, num_rows), path)
    with pytest.raises(ValueError, match=rf"{num_rows} exposures are too few.*bring a longer log"):
        read_log("generic")


def test_a_folder_without_files_is_named(read_log, raw, tmp_path):
    raw("schema.toml", LABELLESS.replace("log.parquet", "logs"))
    (tmp_path / "raw" / "logs").mkdir()
    with pytest.raises(ValueError, match="'logs' is a folder without a table in it"):
        read_log("generic")
