import shutil

import pytest

from data_pipeline import previous, validate
from gpsd_dist.data import data_versions
from tests.unit.data_pipeline.conftest import DAY_S, log_row, manifest_of, rows_of, run, words_of, write_log

LATER = [log_row(1, 11, 6 * DAY_S, click=1), log_row(1, 14, 6 * DAY_S + 9), log_row(9, 10, 6 * DAY_S + 5)]


@pytest.fixture
def built(kuairand_raw, kuairand, tmp_path):
    """(a copy of the prepared data set, a folder with one later log file)."""
    out = tmp_path / "out"
    shutil.copytree(kuairand, out)
    later = tmp_path / "later"
    later.mkdir()
    write_log(later / "log_may01.csv", LATER)
    return out, later


def add(out, later, *options):
    return run("--source", "kuairand_pure", "--raw_dir", later, "--out_dir", out, "--split", "holdout", *options)


def test_holdout_uses_the_old_vocabularies_and_all_earlier_events(built):
    out, later = built
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.parquet")}
    assert add(out, later) == 0
    for folder in (out, data_versions.current(out)):  # the one of before, and that with the holdout
        assert {path: (folder / path).read_bytes() for path in before} == before
    items = words_of(out, "item")
    found = [
        (
            row["user_id"],
            [items[i] for i in row["history.item"]],
            [items[i] for i in row["candidate.item"]],
            row["label.click"],
        )
        for row in rows_of(out, "holdout")
    ]
    history = ["12", "10", "12", "11", "11"]
    assert found == [
        ("1", history, ["11"], [1.0]),
        ("1", [*history, "11"], ["UNK"], [0.0]),  # video 14 was never in training
        ("9", [], ["10"], [0.0]),
    ]
    manifest = validate.check(out)
    assert [split.name for split in manifest.splits] == ["pretrain", "train", "valid", "test", "holdout"]
    assert manifest.skipped["holdout: exposures before the holdout period (used as history only)"] == 10
    assert manifest.options["holdout"]["command"].endswith("--split holdout")


def test_holdout_again_is_a_noop_and_another_log_replaces_it(built, capsys):
    out, later = built
    assert add(out, later) == 0
    assert add(out, later) == 0
    assert "nothing to do" in capsys.readouterr().out
    write_log(later / "log_may01.csv", LATER[:1])
    assert add(out, later) == 0
    manifest = validate.check(out)
    assert manifest.split("holdout").num_rows == 1
    assert len(manifest.splits) == 5


def test_holdout_from_a_folder_that_holds_all_files(built, kuairand_raw):
    out, later = built
    assert add(out, later) == 0
    alone = rows_of(out, "holdout")
    write_log(kuairand_raw / "log_may01.csv", LATER)
    assert add(out, kuairand_raw, "--force") == 0
    assert rows_of(out, "holdout") == alone


def test_rows_of_another_day_at_the_end_of_a_file_are_counted(built, capsys):
    """A file cut by its own `date` holds rows that lie before midnight by time_ms."""
    out, later = built
    many = [log_row(20 + n % 9, 10 + n % 5, 6 * DAY_S + 7 * n) for n in range(250)]
    late = [log_row(1, 12, 6 * DAY_S - 3, click=1), log_row(2, 12, 6 * DAY_S - 2)]
    write_log(later / "log_may01.csv", [*late, *LATER, *many])
    assert add(out, later) == 0
    manifest = manifest_of(out)
    assert manifest.skipped[f"holdout: {previous.LATE}"] == 2
    assert manifest.split("holdout").num_candidates == len(LATER) + len(many)
    items = words_of(out, "item")
    histories = {row["user_id"]: [items[i] for i in row["history.item"]] for row in rows_of(out, "holdout")}
    assert "12" in histories["1"][-2:]  # the late click is history
    late += [log_row(1, 13, 6 * DAY_S - 4), log_row(2, 13, 6 * DAY_S - 4)]
    write_log(later / "log_may01.csv", [*late, *LATER, *many])
    capsys.readouterr()
    assert add(out, later) == 2
    assert "may come late" in capsys.readouterr().err


def test_holdout_does_not_depend_on_the_number_of_buckets(built):
    out, later = built
    assert add(out, later) == 0
    alone = rows_of(out, "holdout")
    assert add(out, later, "--force", "--num_buckets", 3) == 0
    assert rows_of(out, "holdout") == alone


def test_a_failed_holdout_leaves_the_data_set_and_no_debris(built, tmp_path, monkeypatch):
    out, later = built
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(validate, "check_split", lambda root, manifest, split, problems: problems.add("x", "broken"))
    assert add(out, later) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["later", "out", "raw"]


def test_holdout_errors(built, kuairand_raw, tmp_path, capsys):
    out, _ = built
    assert add(out, kuairand_raw) == 2
    assert "--split holdout needs a later log" in capsys.readouterr().err
    assert add(tmp_path / "nothing", kuairand_raw) == 2
    assert "prepare the data first" in capsys.readouterr().err
    assert run("--source", "amazon_grocery", "--raw_dir", kuairand_raw, "--out_dir", out, "--split", "holdout") == 2
    assert "was built with --source kuairand_pure" in capsys.readouterr().err
    (out / "vocab" / "tab.parquet").unlink()
    later = tmp_path / "later"
    assert add(out, later) == 2
    assert "the data set is incomplete" in capsys.readouterr().err
    assert "holdout" not in [split.name for split in manifest_of(out).splits]
