"""Writes the log of a law as files, builds it by `data_pipeline.build --source generic`, and computes its ceiling.

A folder DIR/LAW/ gets raw/ (history, shown, items and users as CSV, schema.toml), data/ (what the build makes of it)
and aside.npz: probabilities and explicit features by user and place in the request, which no model sees.
"""

import collections.abc
import contextlib
import csv
import dataclasses
import hashlib
import io
import pathlib

import numpy as np

from benchmarks.laws.generators import DAY_S, NUM_HISTORY_DAYS, NUM_TRAIN_DAYS, START_S, Log, Users, draw, draw_labels
from data_pipeline import build
from gpsd_dist import schema
from gpsd_dist.baselines import rows
from gpsd_dist.data import data_versions
from gpsd_dist.metrics.binary_metrics import classification_metrics

NUM_USERS, NUM_CANDIDATES = 4000, 10
PSEUDO_COUNTS = 2.0  # weight of the overall rate in the rate of one class of the explicit feature; untuned

_LOGS = """[history]
files = "history.csv"
user = "user"
item = "item"
time = "ts"

[exposure]
files = "shown.csv"
user = "user"
item = "item"
time = "ts"
request = "user"
keep_copies = true # a request may show an item twice
task = [{tasks}]
{exposure_features}
[split]
valid_from = "{valid_from}"
test_from = "{test_from}"
"""
_ATTRIBUTES = """
[{section}]
files = "{section}.csv"
{key} = "{key}"
{features}"""


@dataclasses.dataclass(frozen=True)
class LawData:
    """Points at the files of one law."""

    law: str
    folder: pathlib.Path

    @property
    def raw_dir(self) -> pathlib.Path:
        return self.folder / "raw"

    @property
    def data_dir(self) -> pathlib.Path:
        """Returns the folder of the current version."""
        return data_versions.current(self.folder / "data")

    @property
    def aside(self) -> pathlib.Path:
        return self.folder / "aside.npz"

    @property
    def task(self) -> str:
        """Names the task that the law is about: the last one."""
        return schema.read_manifest(self.data_dir).tasks[-1].name


@dataclasses.dataclass(frozen=True)
class Truth:
    """Holds what is known of the candidates of a split that count for the law's task, in the order of the data."""

    label_N: np.ndarray
    user_hash_N: np.ndarray
    probability_N: np.ndarray
    explicit_N: np.ndarray

    def auc(self, score_N: np.ndarray) -> float:
        """Computes the AUC of any score of these candidates."""
        return classification_metrics(score_N, self.label_N, self.user_hash_N, "score")["auc"]


def prepare(
    law: str, root: pathlib.Path, num_users: int = NUM_USERS, num_candidates: int = NUM_CANDIDATES, seed: int = 0
) -> LawData:
    """Draws, writes and builds the log of a law in `root`; what is there and up to date is kept.

    ValueError for an unknown law, or a folder with a log of another size or seed.
    """
    made = LawData(law, root / law)
    size = np.array([num_users, num_candidates, seed])
    if made.aside.is_file():
        with np.load(made.aside) as aside:
            if not np.array_equal(aside["size"], size):
                raise ValueError(
                    f"{made.folder} has {aside['size'].tolist()} as (users, candidates, seed), asked for are "
                    f"{size.tolist()}; choose another folder"
                )
    else:
        log, users = draw(law, num_users, num_candidates, seed)
        labels = draw_labels(log, users)
        _write_raw(log, users, labels, made.raw_dir)
        parts = {f"probability.{task}": p_UK for task, p_UK in log.probabilities.items()}
        parts |= {f"label.{task}": label_UK for task, label_UK in labels.items()}
        # Written last: a folder that has it has everything before it.
        np.savez_compressed(made.aside, size=size, explicit=log.explicit_UK, **parts)
    argv = ["--source", "generic", "--raw_dir", str(made.raw_dir), "--out_dir", str(made.folder / "data")]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = build.main(argv)
    if status:
        raise ValueError(f"law {law!r}: data_pipeline.build gave status {status}: {said.getvalue()}")
    return made


def truth(made: LawData, split: str) -> Truth:
    """Joins the probabilities to the rows of a split, by user and place in the request.

    ValueError where a request has not the candidates that were drawn for its user.
    """
    manifest, task = schema.read_manifest(made.data_dir), made.task
    with np.load(made.aside) as aside:
        probability_UK, drawn_UK, explicit_UK = (aside[k] for k in (f"probability.{task}", f"label.{task}", "explicit"))
    number = {_user_hash(user): user for user in range(len(explicit_UK))}
    parts = []
    for batch in rows.read_batches(made.data_dir, manifest, split, rows.task_columns(manifest, task)):
        label_N, is_used_N = rows.used_candidates(batch, manifest, task)
        user_hash_B = batch["user_hash"].to_numpy()
        user_B = np.array([number[value] for value in user_hash_B])
        if not np.array_equal(label_N, drawn_UK[user_B].ravel()):
            raise ValueError(
                f"{made.data_dir}: the labels of {split!r} are not those that were drawn; remove the folder"
            )
        user_hash_N = np.repeat(user_hash_B, explicit_UK.shape[1])
        columns = (label_N, user_hash_N, probability_UK[user_B].ravel(), explicit_UK[user_B].ravel())
        parts.append([column[is_used_N] for column in columns])
    label_N, *others = (np.concatenate(column) for column in zip(*parts))
    return Truth(label_N.astype(np.uint8), *others)


def ceiling(made: LawData, split: str) -> float:
    """Computes the AUC of the probabilities that the labels were drawn from: no model can expect more."""
    known = truth(made, split)
    return known.auc(known.probability_N)


def explicit_auc(made: LawData, split: str) -> float:
    """Computes the AUC of rates by the law's explicit feature, counted on train: what can be learnt from the log."""
    train, known = truth(made, "train"), truth(made, split)
    size = 1 + max(train.explicit_N.max(), known.explicit_N.max())
    rows_C = np.bincount(train.explicit_N, minlength=size)
    positives_C = np.bincount(train.explicit_N, train.label_N, minlength=size)
    rate_C = (positives_C + PSEUDO_COUNTS * train.label_N.mean()) / (rows_C + PSEUDO_COUNTS)
    return known.auc(rate_C[known.explicit_N])


def share(auc: float, ceiling_auc: float) -> float:
    """Computes which part of the ceiling's distance from chance an AUC has."""
    return (auc - 0.5) / (ceiling_auc - 0.5)


def _user_hash(user: int) -> int:
    """Hashes a user as `data_pipeline.hashing.user_hash` does."""
    return int(hashlib.md5(f"u{user}".encode()).hexdigest()[:15], 16)


def _write_raw(log: Log, users: Users, labels: dict[str, np.ndarray], raw_dir: pathlib.Path) -> None:
    raw_dir.mkdir(parents=True, exist_ok=True)
    names = list(log.probabilities)
    _write(raw_dir / "history.csv", ["user", "item", "ts"], _event_rows(log))
    features_UK = {name: np.broadcast_to(v, users.shape_UK) for name, v in log.candidate_features.items()}
    features_UK |= {
        name: np.broadcast_to(value_U[:, None], users.shape_UK) for name, value_U in log.context_features.items()
    }
    header = ["user", "item", "ts", *names, *features_UK]
    columns_UK = [labels[name] for name in names] + list(features_UK.values())
    _write(raw_dir / "shown.csv", header, _shown_rows(log, users, columns_UK))
    text = _LOGS.format(
        tasks=", ".join(_task(names, n) for n in range(len(names))),
        exposure_features=_features(
            [(name, value, "candidate") for name, value in log.candidate_features.items()]
            + [(name, value, "context") for name, value in log.context_features.items()]
        ),
        valid_from=_iso(NUM_HISTORY_DAYS + NUM_TRAIN_DAYS),
        test_from=_iso(NUM_HISTORY_DAYS + NUM_TRAIN_DAYS + 1),
    )
    for section, key, features in (("items", "item", log.item_features), ("users", "user", log.user_features)):
        if features:
            columns = [(name, value, "") for name, value in features.items()]
            text += _ATTRIBUTES.format(section=section, key=key, features=_features(columns))
            table = zip(*(_words(value) for value in features.values()))
            _write(
                raw_dir / f"{section}.csv", [key, *features], ((f"{key[0]}{n}", *row) for n, row in enumerate(table))
            )
    (raw_dir / "schema.toml").write_text(text)


def _event_rows(log: Log) -> collections.abc.Iterator[tuple]:
    for user, item_H in enumerate(log.history_UH.tolist()):
        for hour, item in enumerate(item_H):
            if item >= 0:
                yield f"u{user}", f"i{item}", START_S + hour * 3600


def _shown_rows(log: Log, users: Users, columns_UK: list[np.ndarray]) -> collections.abc.Iterator[tuple]:
    columns = [_words(column_UK) for column_UK in columns_UK]
    time_s_U = users.time_s_U.tolist()
    for user, item_K in enumerate(log.shown_UK.tolist()):
        for place, item in enumerate(item_K):
            yield f"u{user}", f"i{item}", time_s_U[user], *(column[user][place] for column in columns)


def _words(values: np.ndarray) -> list:
    return values.tolist() if values.dtype.kind == "i" else np.round(values, 4).tolist()


def _task(names: list[str], number: int) -> str:
    given = f', given = "{names[number - 1]}"' if number else ""
    return f'{{ column = "{names[number]}"{given} }}'


def _features(columns: list[tuple[str, np.ndarray, str]]) -> str:
    """Writes the line `feature = [...]` of a section for (name, values, place or nothing)."""
    parts = []
    for name, values, place in columns:
        kind = "" if values.dtype.kind == "i" else ', kind = "numerical"'
        parts.append(f'{{ column = "{name}"{kind}' + (f', place = "{place}" }}' if place else " }"))
    return f"feature = [{', '.join(parts)}]\n" if parts else ""


def _iso(day: int) -> str:
    return str(np.datetime64(START_S + day * DAY_S, "s"))


def _write(path: pathlib.Path, header: list[str], table: collections.abc.Iterable[tuple]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header])
        csv.writer(file).writerows(table)
