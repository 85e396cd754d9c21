import dataclasses
import pathlib
import re

import pytest

from data_pipeline.sources import log_description

HISTORY = '[history]\nfiles = "a.csv"\nuser = "u"\nitem = "i"\ntime = "t"\n'
EXPOSURE = '[exposure]\nfiles = "b.csv"\nuser = "u"\nitem = "i"\ntime = "t"\ntask = [{ column = "click" }]\n'

WRONG = [
    ("", "neither [history] nor [exposure]"),
    ("[history", "not valid TOML"),
    (HISTORY + 'itm = "x"\n', "unknown key 'history.itm'; did you mean 'item'?"),
    (HISTORY + "[histroy]\n", "unknown key 'histroy'; did you mean 'history'?"),
    (HISTORY.replace('user = "u"\n', ""), "key 'history.user' is missing"),
    (HISTORY.replace('"u"', "3"), "'history.user' is 3, expected str"),
    (HISTORY + 'time_unit = "min"\n', "'history.time_unit' is 'min', expected one of"),
    (HISTORY + 'event_types = "view"\n', "'history.event_types' is 'view', expected a list"),
    (
        HISTORY + 'feature = [{ column = "c", kid = "bag" }]\n',
        "unknown key 'history.feature[0].kid'; did you mean 'kind'?",
    ),
    (HISTORY + 'feature = [{ column = "c", kind = "bag" }]\n', "only [[items.feature]]"),
    (HISTORY + 'feature = [{ column = "c", kind = "text" }]\n', "expected one of"),
    (HISTORY + 'feature = [{ column = "c", place = "context" }]\n', "only for [[exposure.feature]]"),
    (HISTORY + 'feature = [{ column = "c", separator = "|" }]\n', "only a bag has one"),
    (HISTORY + 'feature = [{ column = "c" }, { column = "d", name = "c" }]\n', "the names ['c'] are the same"),
    (HISTORY + 'feature = [{ column = "position" }]\n', "'position' cannot be used"),
    (HISTORY + '[items]\nfeature = [{ column = "place" }]\n', "'place' cannot be used"),
    (HISTORY + '[items]\nfeature = [{ column = "count", kind = "numerical" }]\n', "'count' cannot be used"),
    (HISTORY + '[items]\nfeature = [{ column = "index" }]\n', "'index' cannot be used"),
    (HISTORY + 'feature = [{ column = "a b" }]\n', "'a b' cannot be used"),
    (EXPOSURE, "without [history], exposure.extends_history"),
    (HISTORY + EXPOSURE.replace('[{ column = "click" }]', "[]"), "no [[exposure.task]]"),
    (HISTORY + EXPOSURE + 'feature = [{ column = "s" }]\n', "'exposure.feature[0].place' is '', expected"),
    (HISTORY + EXPOSURE.replace("}]", ', given = "buy" }]'), "given 'buy'; other tasks: ['click']"),
    (HISTORY + EXPOSURE + 'extends_history = "buy"\n', "expected one of the tasks ['click']"),
    (HISTORY + EXPOSURE + '[split]\nrule = "leave_last_out"\n', "cut by 'time'"),
    (HISTORY + EXPOSURE + "negative_sampling_rate = 0\n", "'exposure.negative_sampling_rate' is 0"),
    (
        HISTORY + EXPOSURE.replace("}]", '}, { column = "like" }]') + "negative_sampling_rate = 0.1\n",
        "corrects one task and those that are `given` it, and ['click', 'like'] are given none",
    ),
    (HISTORY + '[split]\nrule = "time"\n', "which cuts [exposure]"),
    (HISTORY + '[split]\nrule = "random"\n', "'split.rule' is 'random', expected one of"),
    (HISTORY + "[split]\nvalid_from = 2024-01-01\n", "only one of `valid_from` and `test_from`"),
    (
        HISTORY + '[split]\nvalid_from = "soon"\ntest_from = 2024-01-01\n',
        "'split.valid_from' is 'soon', expected a date",
    ),
    (
        HISTORY + "[split]\nvalid_from = 1700000000\ntest_from = 2024-01-01\n",
        "as epoch seconds that would be 2023-11-14T22:13:20+00:00: write this",
    ),
    (HISTORY + "[split]\nvalid_fraction = 0.6\ntest_fraction = 0.5\n", "sum to less than 1"),
    (HISTORY + '[split]\ntime_zone = "Mars"\n', "'split.time_zone' is 'Mars'"),
    (HISTORY + "[options]\nmin_count = 0\n", "'options.min_count' is 0, expected at least 1"),
    (HISTORY + '[options]\nnegatives = "hard"\n', "'options.negatives' is 'hard'"),
    (HISTORY + "[csv]\nheader = false\n", "needs `columns` exactly where"),
    (HISTORY + '[items]\nfiles = "i.csv"\n', "needs both `files` and `item`"),
]


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_wrong_descriptions_are_named(tmp_path, text, words):
    path = tmp_path / "schema.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        log_description.read(path)
    assert str(path) in str(error.value)


def test_all_problems_are_listed_at_once(tmp_path):
    path = tmp_path / "schema.toml"
    path.write_text(HISTORY + 'time_unit = "min"\n[options]\nmin_count = 0\nnegatives = "hard"\n')
    with pytest.raises(ValueError, match="min_count") as error:
        log_description.read(path)
    assert "time_unit" in str(error.value)
    assert "negatives" in str(error.value)


def test_defaults_and_dates(tmp_path):
    path = tmp_path / "schema.toml"
    path.write_text(HISTORY + EXPOSURE + "[split]\nvalid_from = 2024-01-02\ntest_from = 2024-01-03T12:00:00+08:00\n")
    read = log_description.read(path)
    assert read.split.valid_from == "2024-01-02"
    assert read.split.test_from == "2024-01-03T12:00:00+08:00"
    assert read.exposure.task[0].label == "click"
    assert read.options == log_description.Options()


def test_the_readme_explains_every_key():
    readme = (pathlib.Path(log_description.__file__).parent / "README.md").read_text()
    for cls in (
        log_description.HistoryLog,
        log_description.ExposureLog,
        log_description.ItemsFile,
        log_description.UsersFile,
    ):
        for field in dataclasses.fields(cls):
            assert f"`{field.name}`" in readme, field.name
    for cls in (log_description.FeatureColumn, log_description.TaskColumn, log_description.CsvStyle):
        for field in dataclasses.fields(cls):
            assert f"`{field.name}`" in readme, field.name
    for cls in (log_description.SplitRule, log_description.Options):
        for field in dataclasses.fields(cls):
            assert f"`{field.name}`" in readme, field.name


def test_the_examples_of_the_readme_are_valid(tmp_path):
    readme = (pathlib.Path(log_description.__file__).parent / "README.md").read_text()
    examples = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    assert examples
    for number, text in enumerate(examples):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        log_description.read(path)
