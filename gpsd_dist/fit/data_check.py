"""Looks at a prepared data set before anything is trained: what is in it, and what cannot be fitted, in plain words."""

import collections.abc
import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from gpsd_dist import schema
from gpsd_dist.baselines.rows import read_rows
from gpsd_dist.data import data_versions
from gpsd_dist.metrics.auc_interval import half_width_of_counts

MIN_PER_CLASS = 10
"""Positives and negatives of the first task that each split needs: below, an AUC is noise (untuned)."""
TYPICAL_AUC, THIN = 0.65, 0.03  # half width of an interval at this AUC from which on a split is called thin (untuned)
SPLITS = ("train", "valid", "test")
_RAW_ENDINGS = (".csv", ".tsv", ".txt", ".dat", ".json", ".jsonl", ".ndjson", ".parquet", ".gz")
_BUILD = "python -m data_pipeline.build --source generic --raw_dir RAW --schema RAW/schema.toml --out_dir"
_SAME_DATA = ("features", "tables", "tasks", "splits")
_YOUNGER = ("log", "counts", "window_s", "prior_exposures")  # fields of a feature


@dataclasses.dataclass(frozen=True)
class SplitFacts:
    """Counts one split, for its first task: candidates whose label is known."""

    candidates: int
    positives: int
    users: int
    history: float  # events per request
    unknown: float  # share of candidates whose item training never saw


@dataclasses.dataclass(frozen=True)
class Facts:
    """Holds what is known about a data set before training."""

    manifest: schema.Manifest
    splits: dict[str, SplitFacts]
    can_pretrain: bool

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks; the first one decides."""
        return tuple(task.name for task in self.manifest.tasks)

    @property
    def fingerprint(self) -> str:
        """Identity of the data set, wherever its folder is."""
        return fingerprint(self.manifest)

    def lines(self) -> collections.abc.Iterator[str]:
        """Yields one line per split, for a person, and a note where one is too thin to tell models apart."""
        pretrain = {split.name: split for split in self.manifest.splits}.get("pretrain")
        if pretrain is not None and self.can_pretrain:
            yield f"pretrain: {pretrain.num_rows:,} histories with {pretrain.num_history_tokens:,} events"
        for name, split in self.splits.items():
            share = f"{split.positives / split.candidates:.1%}"
            yield (
                f"{name}: {split.candidates:,} candidates, {share} with {self.tasks[0]}, of {split.users:,} users; "
                f"{split.history:.1f} events of history each"
            )
        for name in ("valid", "test"):
            split = self.splits[name]
            half_width = half_width_of_counts(TYPICAL_AUC, split.positives, split.candidates - split.positives)
            if half_width > THIN:
                yield (
                    f"note: {name} is thin. It knows an AUC to +- {half_width:.2f} only: smaller differences will end "
                    "in `cannot tell`, whatever is trained; a longer period helps with the square root of its length"
                )


def fingerprint(manifest: schema.Manifest) -> str:
    """Hashes what makes two data sets the same one, wherever their folders are."""
    parts = {name: value for name, value in dataclasses.asdict(manifest).items() if name in _SAME_DATA}
    # Fits that began before a field was there go on. Quantiles follow from the rest, as a build again measures them.
    parts["features"] = [
        {name: value for name, value in feature.items() if name != "quantiles" and (name not in _YOUNGER or value)}
        for feature in parts["features"]
    ]
    if manifest.sampling:
        parts["sampling"] = manifest.sampling
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def look(data_dir: pathlib.Path) -> Facts:
    """Reads manifest and labels. ValueError says what is missing, in the words of whoever has a log, and what to do."""
    manifest, rows = opened(data_dir)
    missing = [name for name in SPLITS if not rows.get(name)]
    if missing:
        raise ValueError(
            f"{data_dir} has no rows in {' and '.join(missing)}: `valid` chooses the model and `test` judges it. Set "
            "valid_from and test_from in the section [split] of the schema (or valid_fraction, test_fraction; no "
            f"`no_valid`), and build again: {_BUILD} {data_versions.root_of(data_dir)}"
        )
    splits = {name: _count(data_dir, manifest, name) for name in SPLITS}
    _check_classes(data_dir, [task.name for task in manifest.tasks], splits)
    return Facts(manifest, splits, rows.get("pretrain", 0) > 0)


def opened(data_dir: pathlib.Path) -> tuple[schema.Manifest, dict[str, int]]:
    """Returns manifest and rows by split. ValueError if there are no data, or none with labels to train on."""
    _check_folder(data_dir)
    manifest = schema.read_manifest(data_dir)
    rows = {split.name: split.num_rows for split in manifest.splits}
    if not manifest.tasks or not rows.get("train"):
        raise ValueError(
            f"{data_dir} has histories, but nothing that was shown with a label (no task, or no row in `train`): there "
            "are no clicks to predict. Describe the log of what was shown in the section [exposure] of the schema, "
            "with a task; pretraining alone needs none: python -m gpsd_dist.train --gin_file configs/stage/pretrain.gin"
        )
    return manifest, rows


def _check_folder(data_dir: pathlib.Path) -> None:
    if not data_dir.is_dir():
        what = "is a file" if data_dir.exists() else "does not exist"
        raise ValueError(
            f"--data {data_dir} {what}; it is the folder that was built from your log: {_BUILD} {data_dir}"
        )
    names = sorted(path.name for path in data_dir.iterdir())
    raw = [name for name in names if name.endswith(_RAW_ENDINGS)]
    if not {schema.MANIFEST_NAME, data_versions.CURRENT_NAME} & set(names):
        if raw:
            found = (
                f"holds raw files ({', '.join(raw[:3])}) and no {schema.MANIFEST_NAME}: describe their columns in a "
            )
            advice = f"TOML file (data_pipeline/sources/README.md) and build: {_BUILD} DATA; then --data DATA"
            raise ValueError(f"--data {data_dir} {found}{advice.replace('RAW', str(data_dir))}")
        what = "is empty" if not names else f"holds no {schema.MANIFEST_NAME}"
        raise ValueError(f"--data {data_dir} {what}: build it from your log first: {_BUILD} {data_dir}")


def _count(data_dir: pathlib.Path, manifest: schema.Manifest, name: str) -> SplitFacts:
    item = f"candidate.{manifest.item_feature}"
    rows, split = read_rows(data_dir, manifest, name, manifest.tasks[0].name, (item,)), manifest.split(name)
    return SplitFacts(
        candidates=len(rows.label_N),
        positives=int(rows.label_N.sum()),
        users=len(np.unique(rows.user_hash_N)),
        history=split.num_history_tokens / split.num_rows,
        unknown=float((rows.keys[item] == schema.UNKNOWN_INDEX).mean()) if len(rows.label_N) else 0.0,
    )


def _check_classes(data_dir: pathlib.Path, tasks: list[str], splits: dict[str, SplitFacts]) -> None:
    task, others = tasks[0], ", ".join(f"`{task}`" for task in tasks[1:])
    other = f", or put another task first in the schema ({others}): the first one decides" if others else ""
    for name, split in splits.items():
        negatives = split.candidates - split.positives
        counts = f"{split.positives:,} of {split.candidates:,} candidates of `{name}` in {data_dir} have {task} = 1"
        if min(split.positives, negatives) == 0:
            lacking = "" if negatives else " Does the log hold what was shown and not clicked, too?"
            raise ValueError(
                f"{counts}: with one class alone nothing can be told apart.{lacking} Take a longer log, or move the "
                f"borders of the splits (section [split]) and build again{other}"
            )
        if min(split.positives, negatives) < MIN_PER_CLASS:
            raise ValueError(
                f"{counts}: too few rows, at least {MIN_PER_CLASS} of each class are needed, and hundreds to tell "
                f"models apart. Take a longer log, or move the borders of the splits, and build again{other}"
            )
