"""Rules of a `log_description.LogDescription` that types cannot say: known values, and references between sections."""

from __future__ import annotations

import datetime
import typing
import zoneinfo

if typing.TYPE_CHECKING:
    from data_pipeline.sources import log_description

SECTIONS = ("history", "exposure", "items", "users")
TIME_UNITS = ("s", "ms", "us", "iso")
FEATURE_KINDS = ("categorical", "numerical", "bag")
RESERVED_NAMES = (
    *(
        "item",
        "item_id",
        "user_id",
        "time_s",
        "order",
        "position",
        "split",
        "num_before",
        "num_events",
        "rank",
        "known_s",
    ),
    *("sequence", "shuffle_key", "request_time_s", "history_length", "user_hash"),  # columns of the pipeline itself
    *("count", "index", "place"),  # columns of vocabularies, of items.parquet, of the choice of the latest attributes
)
SPLIT_RULES = ("time", "last_item_by_time", "leave_last_out")
DRAWS = ("uniform", "popularity")


def problems_of(d: log_description.LogDescription) -> list[str]:
    """Values and references between sections."""
    problems = []
    if d.history is None and d.exposure is None:
        problems.append("there is neither [history] nor [exposure]: describe at least one log")
    if d.history is None and d.exposure is not None and not d.exposure.extends_history:
        problems.append("without [history], exposure.extends_history must name the task whose 1 makes a history event")
    choices = [("split.rule", d.split.rule or "time", SPLIT_RULES), ("options.negatives", d.options.negatives, DRAWS)]
    for section in SECTIONS:
        part = getattr(d, section)
        if part is not None:
            if hasattr(part, "time_unit"):
                choices.append((f"{section}.time_unit", part.time_unit, TIME_UNITS))
            for number, feature in enumerate(part.feature):
                problems += _check_feature(section, f"{section}.feature[{number}]", feature)
    problems += [
        f"{key!r} is {value!r}, expected one of {known}" for key, value, known in choices if value not in known
    ]
    problems += _check_names(d) + _check_exposure(d) + _check_split(d.split)
    if d.exposure is None and d.split.rule == "time":
        problems.append(
            "'split.rule' is 'time', which cuts [exposure]; without it use 'last_item_by_time' or 'leave_last_out'"
        )
    if d.items is not None and bool(d.items.files) != bool(d.items.item):
        problems.append(
            "[items] needs both `files` and `item`, or neither (attributes in the columns of the history log)"
        )
    if d.items is not None and not d.items.files and d.history is None:
        problems.append("[items] without `files` takes the attributes from the history log, and there is no [history]")
    for key in ("max_history_length", "min_count", "num_negatives"):
        if getattr(d.options, key) < 1:
            problems.append(f"'options.{key}' is {getattr(d.options, key)}, expected at least 1")
    if d.csv.header == bool(d.csv.columns):
        problems.append("[csv] needs `columns` exactly where `header = false`")
    return problems


def _check_feature(section: str, where: str, feature: log_description.FeatureColumn) -> list[str]:
    problems = []
    if feature.kind not in FEATURE_KINDS:
        problems.append(f"'{where}.kind' is {feature.kind!r}, expected one of {FEATURE_KINDS}")
    if feature.separator and feature.kind != "bag":
        problems.append(f"'{where}.separator' is set, but kind is {feature.kind!r}; only a bag has one")
    if feature.kind == "bag" and section != "items":
        problems.append(f"'{where}.kind' is 'bag'; only [[items.feature]] can be one")
    if section == "exposure" and feature.place not in ("candidate", "context"):
        problems.append(f"'{where}.place' is {feature.place!r}, expected 'candidate' or 'context'")
    if section != "exposure" and feature.place:
        problems.append(f"'{where}.place' is only for [[exposure.feature]]")
    return problems


def _check_names(d: log_description.LogDescription) -> list[str]:
    parts = [getattr(d, section) for section in SECTIONS]
    names = [feature.label for part in parts if part is not None for feature in part.feature]
    names += [task.name for task in d.tasks()] if d.exposure is not None else []
    twice = sorted({name for name in names if names.count(name) > 1})
    problems = [f"the name {name!r} is used twice; give one of them another `name`" for name in twice]
    taken = sorted(
        {name for name in names if name in RESERVED_NAMES or not name.isidentifier() or name.startswith("_")}
    )
    rule = f"letters, digits and inner underscores, and none of {', '.join(RESERVED_NAMES)}"
    return problems + [f"the name {name!r} cannot be used; give it a `name` of {rule}" for name in taken]


def _check_exposure(d: log_description.LogDescription) -> list[str]:
    if d.exposure is None:
        return []
    problems = []
    names = [task.label for task in d.exposure.task]
    if not names:
        problems.append("[exposure] has no [[exposure.task]]: name at least one label column")
    for task in d.exposure.task:
        if task.given and (task.given not in names or task.given == task.label):
            problems.append(f"task {task.label!r} is given {task.given!r}; other tasks: {names}")
    if d.exposure.extends_history and d.exposure.extends_history not in names:
        problems.append(
            f"'exposure.extends_history' is {d.exposure.extends_history!r}, expected one of the tasks {names}"
        )
    if d.split.rule not in ("", "time"):
        problems.append(f"'split.rule' is {d.split.rule!r}: with an [exposure] log the splits are cut by 'time'")
    return problems


def _check_split(split: log_description.SplitRule) -> list[str]:
    problems = []
    if split.time_zone not in zoneinfo.available_timezones():
        problems.append(f"'split.time_zone' is {split.time_zone!r}, expected a name like 'UTC' or 'Asia/Shanghai'")
    if bool(split.valid_from) != bool(split.test_from):
        problems.append("[split] has only one of `valid_from` and `test_from`; give both, or fractions")
    low, high = split.valid_fraction, split.test_fraction
    for key in ("valid_from", "test_from", "test_until"):
        try:
            datetime.datetime.fromisoformat(getattr(split, key) or "2000-01-01")
        except ValueError:
            problems.append(f"'split.{key}' is {getattr(split, key)!r}, expected a date or an ISO time")
    if split.test_until and not split.test_from:
        problems.append("[split] has `test_until` without `test_from`")
    if not (0 < low < 1 and 0 < high < 1 and low + high < 1):
        problems.append(f"[split] fractions {low} and {high} must lie in (0, 1) and sum to less than 1")
    return problems
