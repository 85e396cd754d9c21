"""How a data set is cut into days: no row, label or name of a later day reaches the model of an earlier one."""

import argparse
import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from gpsd_dist import schema
from gpsd_dist.fit import daily
from gpsd_dist.fit.days import DAY_S, check_can_pretrain, check_days_are_whole, find, name_of
from tests.helpers.synthetic import write_dataset

DAY = 19_000


def read(folder, split: str) -> pa.Table:
    manifest = schema.read_manifest(folder)
    assert [s.num_rows for s in manifest.splits] == [
        sum(pq.read_metadata(folder / file).num_rows for file in s.files) for s in manifest.splits
    ]
    files = [folder / file for file in manifest.split(split).files]
    return pa.concat_tables([pq.read_table(file) for file in files])


def flat(table: pa.Table, column: str) -> np.ndarray:
    values = table[column].combine_chunks()
    while pa.types.is_list(values.type):
        values = pc.list_flatten(values)
    return values.to_numpy(zero_copy_only=False)


def rewrite(data_dir, edit) -> schema.Manifest:
    """Changes the rows of each split by `edit(split, table)`."""
    manifest = schema.read_manifest(data_dir)
    for split in manifest.splits:
        for file in split.files:
            pq.write_table(edit(split.name, pq.read_table(data_dir / file)), data_dir / file, 32)
    return manifest


def with_days(split: str, table: pa.Table) -> pa.Table:
    """Spreads the rows over days 0 ... 5 in the order of the splits, two days each; items of a day are its own.

    Those of day d are 100 + 10 d and so on, which no pretraining history has.
    """
    if split == "pretrain":
        items = [[min(item, 99) for item in row] for row in table["history.item"].to_pylist()]
        number = table.schema.get_field_index("history.item")
        table = table.set_column(number, table.schema.field(number), pa.array(items, table.schema.field(number).type))
        times = [[DAY * DAY_S + 40_000 * n for n in range(length)] for length in table["history_length"].to_pylist()]
        return table.set_column(table.schema.get_field_index("history.time_s"), "history.time_s", pa.array(times))
    first = {"train": 0, "valid": 2, "test": 4}[split]
    day = first + np.arange(len(table)) % 2
    items = [[100 + 10 * d + n for n in range(len(row))] for d, row in zip(day, table["candidate.item"].to_pylist())]
    time_s = (DAY + day) * DAY_S + np.arange(len(table)) * 7
    table = table.set_column(table.schema.get_field_index("request_time_s"), "request_time_s", pa.array(time_s))
    lists = pa.array(items, table.schema.field("candidate.item").type)
    table = table.set_column(table.schema.get_field_index("candidate.item"), "candidate.item", lists)
    for name in [name for name in table.column_names if name.startswith("history.")]:
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array([[] for _ in items], field.type))
    zeros = pa.array(np.zeros(len(table), np.int32))
    return table.set_column(table.schema.get_field_index("history_length"), "history_length", zeros)


def cut(data_dir, manifest, folder, num_scored):
    found = find(data_dir, manifest, folder, num_scored)
    found.write(data_dir)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("days") / "data"
    write_dataset(folder, seed=0, num_rows=60, num_files=1)
    return folder, rewrite(folder, with_days)


@pytest.fixture
def days(data, tmp_path):
    return cut(*data, tmp_path / "rows", 4)


def test_a_model_sees_no_row_after_its_day(days, tmp_path):
    assert days.models == tuple(range(DAY + 1, DAY + 5)) and days.scored == tuple(range(DAY + 2, DAY + 6))
    for day in days.models:
        made = days.data_set(tmp_path / str(day), range(DAY, day + 1), (), range(day + 1, DAY + 6), known=day)
        train, test = read(made, "train"), read(made, "test")
        assert set(flat(train, "request_time_s") // DAY_S) == set(range(DAY, day + 1))
        assert set(flat(test, "request_time_s") // DAY_S) == set(range(day + 1, DAY + 6))
        assert len(train) + len(test) == 180
        # Items are those of their day alone: to this model, all of the days that it is scored on are new.
        assert flat(train, "candidate.item").min() >= 100 and set(flat(test, "candidate.item")) == {
            schema.UNKNOWN_INDEX
        }
        split = schema.read_manifest(made).split("train")
        assert split.num_candidates == len(flat(train, "candidate.item"))
        assert split.time_to_s == flat(train, "request_time_s").max() < (day + 1) * DAY_S


def test_what_an_earlier_day_showed_stays_known(days, tmp_path):
    made = days.data_set(tmp_path / "all", [DAY], [DAY + 1], [DAY + 2], known=DAY + 2)
    assert set(flat(read(made, "test"), "candidate.item") // 10) == {12}
    assert schema.read_manifest(made).split("valid").num_rows == len(read(made, "valid"))


def test_values_are_masked_in_every_place_and_lists_keep_their_form(data, tmp_path):
    folder, manifest = data
    days = cut(folder, manifest, tmp_path / "rows", 1)
    made = days.data_set(tmp_path / "made", range(DAY + 3, DAY + 5), (), [DAY + 5], known=DAY - 1)
    plain, masked = pq.read_table(days.file(DAY + 5)), read(made, "test")
    pretrained = {c: set(flat(read(made, "pretrain"), f"history.{c}")) for c in ("item", "category", "tags")}
    assert len(masked) == len(plain)
    for column, place in (("item", "candidate"), ("category", "candidate"), ("tags", "candidate")):
        name = f"{place}.{column}"
        before, after = flat(plain, name), flat(masked, name)
        assert (after == np.where(np.isin(before, list(pretrained[column])), before, 1)).all()
        assert masked[name].combine_chunks().value_lengths() == plain[name].combine_chunks().value_lengths()
    assert set(flat(masked, "context.segment")) == {1}  # pretraining has none
    assert (flat(masked, "candidate.price") == flat(plain, "candidate.price")).all()


def test_pretraining_ends_where_the_first_model_begins(days, tmp_path):
    made = days.data_set(tmp_path / "made", [DAY], (), [DAY + 2], known=DAY)
    rows = read(made, "pretrain")
    assert flat(rows, "history.time_s").max() < (DAY + 1) * DAY_S  # events come every 40,000 s: three on the first day
    lengths = rows["history_length"].to_numpy()
    assert set(lengths) <= {2, 3} and 3 in lengths
    assert (pc.list_value_length(rows["history.tags"]).to_numpy() == lengths).all()
    assert schema.read_manifest(made).split("pretrain").num_history_tokens == lengths.sum()


def test_a_pretraining_that_would_have_no_event_is_refused(data, tmp_path):
    """The whole log has long histories, but the first model's day comes before all but one event of each."""
    folder, manifest = data
    later = find(folder, manifest, tmp_path / "rows", 4)
    check_can_pretrain(folder, manifest, later)
    early = dataclasses.replace(later, models=(DAY, *later.models))
    with pytest.raises(ValueError, match=r"two events before 2022-01-08 \(UTC\).*--days 3 .* --strategies NT"):
        check_can_pretrain(folder, manifest, early)


def test_days_that_cannot_be_had_are_named(data, tmp_path):
    folder, manifest = data
    assert find(folder, manifest, tmp_path / "rows", None).scored == tuple(range(DAY + 3, DAY + 6))  # the later half
    with pytest.raises(ValueError, match=r"requests of 6 days, 2022-01-08 to .* 5 of them would be .* --days 4"):
        cut(folder, manifest, tmp_path / "rows", 5)


@pytest.mark.parametrize(
    ("kept", "words"), [(1, "1 day (2022-01-08, UTC)"), (2, "2 days (2022-01-08, 2022-01-09, UTC)")]
)
def test_a_log_of_a_day_or_two_is_refused(tmp_path, kept, words):
    made = write_dataset(tmp_path / "data", seed=0, num_rows=20, num_files=1)
    only = dataclasses.replace(made, splits=tuple(split for split in made.splits if split.name == "train"))
    is_kept = pa.array(np.arange(20) % 2 < kept)
    rewrite(tmp_path / "data", lambda split, t: with_days(split, t).filter(is_kept) if split == "train" else t)
    with pytest.raises(ValueError, match="one day to train on, one to choose") as caught:
        cut(tmp_path / "data", only, tmp_path / "rows", None)
    assert words in str(caught.value)


@pytest.mark.parametrize("time_s", [None, 0, -5])
def test_requests_without_a_time_are_refused(tmp_path, time_s):
    manifest = write_dataset(tmp_path / "data", seed=0, num_rows=20, num_files=1)

    def edit(split, table):
        if split != "test":
            return table
        times = pa.array([time_s, *table["request_time_s"].to_pylist()[1:]], pa.int64())
        return table.set_column(table.schema.get_field_index("request_time_s"), "request_time_s", times)

    rewrite(tmp_path / "data", edit)
    with pytest.raises(ValueError, match="requests without a time"):
        cut(tmp_path / "data", manifest, tmp_path / "rows", None)


def test_requests_that_may_reach_over_midnight_are_refused(data):
    folder, manifest = data
    by_time = dataclasses.replace(manifest, options={"split_rule": "TimeBoundaries"})
    with pytest.raises(ValueError, match=r"reach over midnight.*--daily_requests"):
        check_days_are_whole(folder, by_time)
    check_days_are_whole(folder, manifest)
    check_days_are_whole(folder, dataclasses.replace(by_time, options=by_time.options | {"daily_requests": True}))
    single = tuple(dataclasses.replace(split, num_candidates=split.num_rows) for split in by_time.splits)
    check_days_are_whole(folder, dataclasses.replace(by_time, splits=single))


def test_a_gap_is_said_and_bridged(tmp_path):
    manifest = write_dataset(tmp_path / "data", seed=0, num_rows=30, num_files=1)
    late = {"test": 7 * DAY_S}

    def edit(split, table):
        if split == "pretrain":
            return table
        number = table.schema.get_field_index("request_time_s")
        return table.set_column(number, "request_time_s", pc.add(table["request_time_s"], late.get(split, 0)))

    rewrite(tmp_path / "data", edit)
    days = cut(tmp_path / "data", manifest, tmp_path / "rows", 2)
    assert [b - a for a, b in zip(days.models, days.scored)][-2] > 5
    said = list(days.lines())[1]
    assert (
        said.startswith("note: ")
        and "days in between have no request (" in said
        and name_of(days.models[-2] + 1) in said
    )


def test_a_split_without_rows_is_none_without_times(tmp_path):
    """Such a file has one row group, of no row."""
    manifest = write_dataset(tmp_path / "data", seed=0, num_rows=60, num_files=1)
    rewrite(tmp_path / "data", lambda name, table: with_days(name, table)[: 0 if name == "valid" else None])
    days = cut(tmp_path / "data", manifest, tmp_path / "rows", 2)
    assert (days.models, days.scored) == ((DAY + 1, DAY + 4), (DAY + 4, DAY + 5))


@pytest.mark.parametrize(("split", "which"), [("train", "of 2022-01-09"), ("all", "before 2022-01-11")])
def test_a_first_model_of_one_class_is_refused(tmp_path, split, which):
    """Ones on day 1, which is the first model's, or on days 0 to 2, before the first model of two scored days."""
    manifest = write_dataset(tmp_path / "data", seed=0, num_rows=60, num_files=1)

    def edit(name, table):
        table = with_days(name, table)
        if name == "pretrain":
            return table
        day = flat(table, "request_time_s") // DAY_S - DAY
        is_one = day == 1 if split == "train" else day < 3
        labels = table["label.click"].to_pylist()
        ones = [[1.0] * len(row) if one else row for row, one in zip(labels, is_one, strict=True)]
        field = table.schema.field("label.click")
        return table.set_column(table.schema.get_field_index("label.click"), field, pa.array(ones, field.type))

    rewrite(tmp_path / "data", edit)
    with pytest.raises(ValueError, match=r"with click = 1: with one class alone .*--days \d scores fewer") as caught:
        find(tmp_path / "data", manifest, tmp_path / "rows", 4 if split == "train" else 2)
    assert f"the requests {which} (UTC)" in str(caught.value) and not (tmp_path / "rows").exists()


class FakeRunner:
    """Records what it is told to train and score; the budget ends it before `last`."""

    def __init__(self, facts, left_out: str = ""):
        self.facts, self.trained, self.scored, self._stop = facts, {}, [], left_out
        self.data_dir = self.out_dir = None
        self.display = argparse.Namespace(say=lambda text: None)

    def train(self, title, training, *, is_whole):
        assert is_whole
        if self._stop and title.startswith(self._stop):
            return False
        self.trained[title] = training
        return True

    def score(self, title, training, split):
        self.scored.append((self.data_dir, training.folder))

    def floor(self, name, split, title):
        return {}


@pytest.fixture
def told(days, tmp_path, monkeypatch):
    """Runs all days with a runner that only records; the first training was best after 2.6 epochs."""
    best = argparse.Namespace(run_config={"model": {"matches": True}})  # of before bag_matches
    monkeypatch.setattr(daily.manager, "find", lambda folder: folder)
    monkeypatch.setattr(daily, "read_run", lambda folder: best)
    monkeypatch.setattr(daily, "epochs_done", lambda state: 2.6)
    monkeypatch.setattr(daily, "read_scores", lambda path: {})
    monkeypatch.setattr(daily, "cpu_s", lambda folder: 1.0)

    def tell(*more: str, left_out: str = ""):
        from gpsd_dist.fit.__main__ import parse

        options = (
            "--data",
            str(tmp_path),
            "--days",
            "4",
            "--out",
            str(tmp_path / "run"),
            "--nproc",
            "1",
            "--models",
            "l1h32a4",
        )
        args = parse([*options, "--daily", *more])
        facts = daily.Facts(days.manifest, {}, True)
        runner = FakeRunner(facts, left_out)
        scores = daily._Daily(args, days, runner, daily.make_plan(args, True)).all()
        return runner, scores

    return tell


def test_a_warm_start_begins_with_the_model_of_the_day_before(told, days):
    runner, scores = told("--warm_epochs", "2")
    names = [name_of(day) for day in days.models]
    assert list(runner.trained)[:4] == ["pretraining", f"how many epochs, on {names[0]}", f"{names[0]} from scratch",
                                        f"{names[1]} from scratch"]  # fmt: skip
    before = runner.trained[f"{names[0]} from scratch"]
    pretraining = runner.trained["pretraining"].folder
    for name in names[1:]:
        warm, scratch = runner.trained[f"{name} warm start"].run, runner.trained[f"{name} from scratch"].run
        assert (warm.init_checkpoint, warm.strategy) == (str(before.folder), "FT_SF") and warm.finetune.warm_start
        assert (scratch.init_checkpoint, scratch.strategy) == (str(pretraining), "FT_SF")
        assert not scratch.finetune.warm_start
        assert (warm.train.epochs, scratch.train.epochs) == (
            2,
            3,
        ) and warm.model.matches is scratch.model.matches is True
        assert warm.model.bag_matches is scratch.model.bag_matches is False
        new, everything = (schema.read_manifest(run.data_dir).split("train") for run in (warm, scratch))
        assert new.time_from_s // DAY_S == new.time_to_s // DAY_S == everything.time_to_s // DAY_S
        assert everything.time_from_s // DAY_S == DAY
        before = runner.trained[f"{name} warm start"]
    assert [(one.label, name_of(one.day)) for one in scores][:3] == [
        ("from scratch", names[0]), ("from scratch", names[1]), ("warm start", names[1])]  # fmt: skip


def test_the_length_of_a_training_is_chosen_before_anything_is_scored(told, days):
    runner, _ = told()
    choice = runner.trained[f"how many epochs, on {name_of(days.first)}"].run
    manifest = schema.read_manifest(choice.data_dir)
    assert manifest.split("train").time_to_s < days.first * DAY_S <= manifest.split("valid").time_from_s
    assert manifest.split("valid").time_to_s < (days.first + 1) * DAY_S and not manifest.split("test").num_rows


def test_the_budget_ends_between_days_with_the_scores_so_far(told, days):
    _, scores = told(left_out=f"{name_of(days.models[2])} warm")
    assert {one.day for one in scores} == set(days.models[:2])
    assert not told(left_out="pretraining")[1] and not told(left_out="how many")[1]


def test_a_strategy_without_frozen_tables_goes_on_without(told, days):
    runner, _ = told("--strategies", "NT")
    assert "pretraining" not in runner.trained
    warm = runner.trained[f"{name_of(days.models[1])} warm start"].run
    assert warm.strategy == "FT" and not warm.frozen_tables


def test_cpu_seconds_add_up_over_restarts(tmp_path):
    used = [3, None, 5.5, 2, 4]
    lines = ["{}" if value is None else f'{{"perf/cpu_s": {value}}}' for value in used]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert daily.cpu_s(tmp_path) == 9.5


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--models", "l1h32a4,hstu"), "--daily follows one model"),
        (("--strategies", "NT,ST"), "--daily follows one model"),
        (("--days", "0"), "must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(more, words, capsys):
    from gpsd_dist.fit.__main__ import parse

    with pytest.raises(SystemExit, match="2"):
        parse(["--data", "d", "--out", "o", "--daily", *more])
    assert words in capsys.readouterr().err
