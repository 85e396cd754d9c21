"""Daily builds: appending a day against building everything again with the boundaries moved by hand."""

import datetime
import json
import pathlib
import re

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_pipeline import fingerprint, synthesize, synthetic_log, validate
from gpsd_dist.data import data_versions
from tests.assets.cases import logs
from tests.helpers.parquet_rows import rows_sha256
from tests.unit.data_pipeline.conftest import DAY_S, log_row, manifest_of, run, words_of, write_log
from tests.unit.data_pipeline_sources.conftest import Prepared

CONFIG = synthetic_log.SyntheticConfig(
    num_users=60, num_items=1_600, requests_per_day=25, train_days=2, valid_days=1, test_days=3, min_count=2
)
FIRST_DAY_UNTIL_S = CONFIG.boundaries_s[2] + DAY_S


def cut_log(whole: pathlib.Path, raw: pathlib.Path, until_s: int) -> pathlib.Path:
    """The log as it was at that time."""
    raw.mkdir()
    for name in ("items.parquet", "users.parquet", "schema.toml"):
        (raw / name).write_bytes((whole / name).read_bytes())
    for name in ("behaviours.parquet", "exposures.parquet"):
        table = pq.read_table(whole / name)
        pq.write_table(table.filter(pc.less(table["time_s"], until_s)), raw / name)
    return raw


def build(raw: pathlib.Path, out: pathlib.Path, *options) -> int:
    return run("--source", "generic", "--raw_dir", raw, "--out_dir", out, *options)


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """Root of `whole`, `raw1`, `raw2` (logs), `day1`, `day2`, `day3` (appended) and `again2` (built from raw2)."""
    root = tmp_path_factory.mktemp("days")
    synthesize.write(CONFIG, root / "whole")
    raws = [cut_log(root / "whole", root / f"raw{n + 1}", FIRST_DAY_UNTIL_S + n * DAY_S) for n in range(3)]
    assert build(raws[0], root / "day1") == 0
    assert build(raws[1], root / "day2", "--append_to", root / "day1") == 0
    assert build(raws[2], root / "day3", "--append_to", root / "day2", "--num_buckets", 2) == 0
    bounds = manifest_of(root / "day2").options["boundaries_s"]
    path = root / "again.toml"
    old = [datetime.datetime.fromtimestamp(s, datetime.UTC).date().isoformat() for s in CONFIG.boundaries_s[1:3]]
    new = [datetime.datetime.fromtimestamp(s, datetime.UTC).isoformat() for s in bounds[:2]]
    text = (raws[1] / "schema.toml").read_text()
    for name, before, after in zip(("valid_from", "test_from"), old, new):
        assert f"{name} = {before}" in text
        text = text.replace(f"{name} = {before}", f"{name} = {after}")
    path.write_text(text)
    assert build(raws[1], root / "again2", "--schema", path) == 0
    return root


def files_of(days, name: str) -> pathlib.Path:
    """Folder with the files of a data set: its only version."""
    return data_versions.current(days / name)


def test_old_ids_keep_their_index_and_new_ones_follow(days):
    grown = 0
    for earlier, later in (("day1", "day2"), ("day2", "day3")):
        for table in manifest_of(days / earlier).tables:
            before, after = words_of(days / earlier, table.name), words_of(days / later, table.name)
            assert {index: after[index] for index in before} == before
            grown += len(after) - len(before)
    assert grown > 20


def test_vocabularies_are_those_of_a_full_build_as_sets_with_counts(days):
    """Also the rule of min_count 2: an id may have one occurrence on each of two days."""
    for table in manifest_of(days / "again2").tables:
        pairs = []
        for name in ("day2", "again2"):
            words = pq.read_table(files_of(days, name) / "vocab" / f"{table.name}.parquet").to_pydict()
            pairs.append(dict(zip(words["raw_id"], words["count"])))
        assert pairs[0] == pairs[1], table.name


def test_the_day_and_its_pretraining_rows_equal_a_full_build(days):
    appended, again = Prepared(days / "day2"), Prepared(days / "again2")
    assert appended.rows("test") == again.rows("test")
    assert len(appended.rows("test")) > 15
    new = appended.manifest.split("pretrain").files[-1]
    assert new.startswith("appended-0001")
    rows = {row["user_id"] for row in pq.read_table(files_of(days, "day2") / new).to_pylist()}
    assert 5 < len(rows) < CONFIG.num_users
    histories = {row["user_id"]: row["history.item"] for row in pq.read_table(files_of(days, "day2") / new).to_pylist()}
    words = appended.words["item"]
    for user in rows:
        assert [words[index] for index in histories[user]] == again.rows("pretrain")[user,]["history.item"]


def test_older_rows_differ_from_a_full_build_only_where_an_id_was_unknown(days):
    num_equal = num_late = 0
    for split in ("train", "valid"):
        before, after = (by_history(Prepared(days / name), split) for name in ("day2", "again2"))
        assert before.keys() == after.keys()
        for key, values in before.items():
            for old, new in zip(values, after[key], strict=True):
                assert old in (new, "UNKNOWN"), (split, key)
                num_equal, num_late = num_equal + (old == new), num_late + (old != new)
    assert num_equal > 1_000
    assert num_late > 0


def by_history(data: Prepared, split: str) -> dict[tuple, list]:
    """{(user, times of the history): all values of history and candidates in order of time}.

    Exposures that see the same history are one row of one split: where the old `train` and `valid` meet, the appended
    data set has two rows, and a full build one.
    """
    found: dict[tuple, list] = {}
    for _, row in sorted(data.rows(split).items()):
        key = (row["user_id"], *row["history.time_s"])
        names = [name for name in row if name.startswith(("candidate.", "label."))]
        if key not in found:
            found[key] = [entry for name in row if name.startswith("history.") for entry in row[name]]
        found[key] += [row[name][place] for place in range(len(row["candidate.item"])) for name in names]
    return found


def test_the_chain_names_every_parent(days):
    manifests = [validate.check(days / f"day{n}") for n in (1, 2, 3)]
    chain = manifests[2].options["chain"]
    assert len(chain) == 2 and "chain" not in manifests[0].options
    for number, step in enumerate(chain):
        parent = files_of(days, f"day{number + 1}") / "manifest.json"
        assert step["parent_manifest_sha256"] == fingerprint.file_sha256(parent)
        assert step["tables"] == [
            {"name": t.name, "num_rows": t.num_rows, "fingerprint": t.fingerprint} for t in manifests[number].tables
        ]
        assert step["new_rows"]["item"] == (
            manifests[number + 1].table("item").num_rows - manifests[number].table("item").num_rows
        )
    assert manifests[2].features == manifests[0].features  # means and deviations stay those of the first model


def test_splits_move_on_and_old_files_are_the_same(days):
    one, two = (manifest_of(days / f"day{n}") for n in (1, 2))
    assert two.split("train").files == one.split("train").files + one.split("valid").files
    assert two.split("valid").files == one.split("test").files
    for split in one.splits:
        for file in split.files:
            assert (files_of(days, "day1") / file).samefile(files_of(days, "day2") / file)


def test_in_place_and_again_is_a_noop(days, tmp_path, capsys):
    assert build(days / "raw1", tmp_path / "out") == 0
    assert build(days / "raw2", tmp_path / "out", "--append_to", tmp_path / "out") == 0
    expected = files_of(days, "day2")
    for path in sorted(expected.rglob("*.parquet")):
        assert rows_sha256(files_of(tmp_path, "out") / path.relative_to(expected)) == rows_sha256(path)
    capsys.readouterr()
    assert build(days / "raw2", tmp_path / "out", "--append_to", tmp_path / "out") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert build(days / "raw2", days / "day2", "--append_to", days / "day1") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_what_cannot_be_appended_is_an_error(days, tmp_path, grocery, grocery_raw, capsys):
    out = ("--append_to", days / "day1")
    assert build(days / "raw1", tmp_path / "out", *out) == 2
    assert "needs a later log" in capsys.readouterr().err
    later = cut_log(days / "whole", tmp_path / "later", FIRST_DAY_UNTIL_S + DAY_S)
    table = pq.read_table(later / "exposures.parquet")
    pq.write_table(table.slice(40), later / "exposures.parquet")
    assert build(later, tmp_path / "out", *out) == 2
    assert "histories need the whole log" in capsys.readouterr().err
    arguments = ("--source", "amazon_grocery", "--raw_dir", grocery_raw, "--out_dir", tmp_path / "out")
    assert run(*arguments, "--append_to", grocery) == 2
    assert "its splits are not cut by time (rule Given)" in capsys.readouterr().err
    assert build(later, tmp_path / "out", *out, "--split", "holdout") == 2
    assert "leave --split out" in capsys.readouterr().err
    assert build(later, tmp_path / "out", *out, "--min_count", 3, "--seed", 0, "--compression", "lz4") == 2
    error = capsys.readouterr().err
    assert "with other options: --compression lz4 (then: zstd), --min_count 3 (then: 2); leave them out" in error
    assert not (tmp_path / "out").exists()


def test_a_holdout_needs_the_whole_log(days, tmp_path, capsys):
    """Its histories reach back: a log without the old exposures is refused, not taken for users without a past."""
    until = datetime.datetime.fromtimestamp(FIRST_DAY_UNTIL_S, datetime.UTC).isoformat()
    schema_file = tmp_path / "schema.toml"
    text = (days / "raw1" / "schema.toml").read_text()
    schema_file.write_text(text.replace("\ntest_from", f"\ntest_until = {until}\ntest_from"))
    out, later = tmp_path / "out", cut_log(days / "whole", tmp_path / "later", FIRST_DAY_UNTIL_S + DAY_S)
    assert build(days / "raw1", out, "--schema", schema_file) == 0
    assert build(later, out, "--schema", schema_file, "--split", "holdout") == 0
    assert manifest_of(out).split("holdout").num_rows > 0
    table = pq.read_table(later / "exposures.parquet")
    pq.write_table(table.slice(40), later / "exposures.parquet")
    assert build(later, out, "--schema", schema_file, "--split", "holdout") == 2
    assert re.search(r"the log holds [\d,]+ exposures before \d+ .* was made of", capsys.readouterr().err)
    assert build(days / "raw2", days / "day1", "--split", "holdout") == 2
    assert "the split rule of this log has no end of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "chain",
            [{"parent": "day0"}],
            "options.chain, what the data set grew from, holds {'parent': 'day0'}, expected",
        ),
        ("chain", 5, "options.chain, what the data set grew from, holds 5, expected steps {'tables':"),
        ("boundaries_s", [3, 2, 1], "options.boundaries_s is [3, 2, 1], expected three times"),
        ("raw_dir", [], "options.raw_dir is [], expected a folder's name"),
    ],
)
def test_options_of_the_parent_that_cannot_be(days, tmp_path, capsys, name, value, words):
    parent = tmp_path / "day1"
    parent.mkdir()
    document = json.loads((files_of(days, "day1") / "manifest.json").read_text())
    document["options"][name] = value
    (parent / "manifest.json").write_text(json.dumps(document))
    assert build(days / "raw2", tmp_path / "out", "--append_to", parent) == 2
    error = capsys.readouterr().err
    assert f"{parent / 'manifest.json'}: {words}" in error and "build the data set again" in error


def test_a_source_that_finds_older_files_where_the_parent_was_built_from(kuairand_raw, tmp_path):
    common = ("--source", "kuairand_pure", "--out_dir", tmp_path / "out")
    assert run(*common, "--raw_dir", kuairand_raw) == 0
    later = tmp_path / "later"
    later.mkdir()
    write_log(later / "log_may01.csv", [log_row(1, 14, 6 * DAY_S, click=1), log_row(9, 10, 6 * DAY_S + 5)])
    before, parent = words_of(tmp_path / "out", "item"), manifest_of(tmp_path / "out")
    assert run(*common, "--raw_dir", later, "--append_to", tmp_path / "out") == 0
    manifest = validate.check(tmp_path / "out")
    old = {split.name: split.num_rows for split in parent.splits}
    new = {split.name: split.num_rows for split in manifest.splits}
    assert new == {"pretrain": old["pretrain"], "train": old["train"] + old["valid"], "valid": old["test"], "test": 2}
    assert words_of(tmp_path / "out", "item").items() >= before.items()


def _priced(
    folder: pathlib.Path, num_days: int, price: float = 1.0, ids: str = "{}", keys: str = "", end: str = ".0"
) -> pathlib.Path:
    """Twelve exposures of three users a day; from the third day on, prices are `price` times those of before."""
    text = f"""
[exposure]
files = "log.csv"
user = "u"
item = "i"
time = "t"
task = [{{ column = "click" }}]
extends_history = "click"
feature = [{{ column = "price", place = "candidate", kind = "numerical", clip_quantile = 0.1 }}]
[split]
valid_from = 2024-01-02
test_from = 2024-01-03
test_until = 2024-01-04
{keys}"""
    midnight_s, rows = int(datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC).timestamp()), []
    for n in range(12 * num_days):
        is_late = n >= 36
        item = (ids if is_late else "{}").format(f"{100 + n % 5}{end}")
        cost = (1 + n % 12) * (price if is_late else 1.0)
        rows.append((f"u{n % 3}", item, midnight_s + n * 7200, int(n % 2 == 0), cost))
    return logs.write(folder, text, {"log.csv": logs.lines(rows, "u,i,t,click,price")})


def test_an_appended_day_is_cut_off_where_the_first_was(tmp_path):
    assert build(_priced(tmp_path / "raw1", 3), tmp_path / "out") == 0
    raw = _priced(tmp_path / "raw2", 4, price=1000.0)
    assert build(raw, tmp_path / "out", "--append_to", tmp_path / "out") == 0
    clip = manifest_of(tmp_path / "out").options["reading"]["clip"]
    assert clip == {"price": [2.0, 11.0]}
    [file] = manifest_of(tmp_path / "out").split("test").files
    prices = pq.read_table(data_versions.current(tmp_path / "out") / file)["candidate.price"].to_pylist()
    assert {price for row in prices for price in row} == {11.0}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ids": "x{}"}, "spells the ids of ['item'] without a .0"),
        ({"keys": '[csv]\nnull_words = ["-"]\n'}, "was built with null_words ('nan',"),
    ],
)
def test_a_day_whose_values_would_be_read_otherwise_is_refused(tmp_path, capsys, changed, words):
    assert build(_priced(tmp_path / "raw1", 3), tmp_path / "out") == 0
    assert build(_priced(tmp_path / "raw2", 4, **changed), tmp_path / "out", "--append_to", tmp_path / "out") == 2
    assert words in capsys.readouterr().err


def test_a_day_whose_ids_are_all_unknown_is_a_warning(tmp_path, capsys):
    assert build(_priced(tmp_path / "raw1", 3, end=""), tmp_path / "out") == 0
    assert "unknown" not in capsys.readouterr().out
    raw = _priced(tmp_path / "raw2", 4, end="", ids="0{}")
    assert build(raw, tmp_path / "out", "--append_to", tmp_path / "out") == 0
    assert "split 'test': 100% of candidate.item are unknown to training" in capsys.readouterr().out
