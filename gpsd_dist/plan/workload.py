"""Estimates the work of one rank in a step without making a batch: requests, tokens, distinct table rows."""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpsd_dist.config import RunConfig
from gpsd_dist.schema import NUM_RESERVED_ROWS, Feature, Manifest

_SAMPLE_ROWS = 50_000


@dataclasses.dataclass(frozen=True)
class DataShape:
    """Describes the mean request of a split and how often each table row occurs."""

    history: float  # mean history tokens after truncation, which is what a token budget counts
    context: float  # mean number of tokens that a history token attends to, itself included
    candidates: float  # mean candidates of a request
    bag_sizes: dict[str, float]  # bag feature -> mean rows of one bag
    counts: dict[str, np.ndarray]
    """Table -> how often each known row occurs in the training period; without it, all rows are equally frequent."""
    notes: tuple[str, ...]  # where the figures come from


@dataclasses.dataclass(frozen=True)
class Workload:
    """Holds the mean work of one rank in one step; means are not integers."""

    requests: float
    tokens: float  # T, history tokens
    candidates: float  # C; 0 in pretraining
    context: float  # mean number of tokens that a history token attends to
    negatives: int  # over all sets and micro-batches; 0 in finetuning
    unique_rows: dict[str, float]  # sharded table -> U, distinct rows that are looked up

    @property
    def positions(self) -> float:
        """Counts M, the history tokens with a next item to predict."""
        return max(self.tokens - self.requests, 0.0)

    def without_last(self) -> "Workload":
        """Leaves out the last token of every history, as the tower does in pretraining."""
        kept = self.positions
        # A history of n tokens has n (n + 1) / 2 pairs, and n fewer without its last token.
        context = (self.context - 1) * self.tokens / kept if kept else 0.0
        return dataclasses.replace(self, tokens=kept, context=context)

    @property
    def candidate_keys(self) -> float:
        """Counts the keys that all candidates attend to: each its history and itself."""
        return self.candidates * (self.tokens / max(self.requests, 1e-9) + 1)


def data_shape(run: RunConfig, manifest: Manifest, split: str) -> DataShape:
    """Measures the first rows of the split and the vocabularies; takes from the manifest what is not on this disk."""
    described = manifest.split(split)
    rows = max(described.num_rows, 1)
    folder, cut = pathlib.Path(run.data_dir), run.data.max_history_length
    bags = {feature.name: feature for feature in manifest.features if feature.is_bag}
    counts, notes = _vocabulary_counts(folder, manifest), []
    uniform = sorted({table.name for table in manifest.tables} - set(counts))
    if uniform:
        notes.append(f"no vocab/*.parquet of {uniform}: their rows count as equally frequent (the most exchange)")
    stored = described.num_history_tokens / rows
    candidates = described.num_candidates / rows
    sample = _sample(folder, described.files, list(bags.values()), with_candidates=described.num_candidates > 0)
    if sample is None:
        history = min(stored, cut)
        if bags:
            notes.append(f"the files of {split} are not here: bags {sorted(bags)} count as one row each")
        notes.append(
            f"the files of {split} are not here: every history has the manifest's mean of {history:.1f} tokens"
        )
        return DataShape(history, (history + 1) / 2, candidates, dict.fromkeys(bags, 1.0), counts, tuple(notes))
    length = np.minimum(sample["history_length"].to_numpy(), cut).astype(np.float64)
    notes.append(f"history lengths and bags: the first {len(sample):,} rows of {split}")
    context = float((length * (length + 1) / 2).sum() / max(length.sum(), 1.0))
    sizes = {name: _mean_bag(sample, feature) for name, feature in bags.items()}
    return DataShape(float(length.mean()), context, candidates, sizes, counts, tuple(notes))


def with_assumptions(
    shape: DataShape, *, mean_history: float | None, candidates: float | None, table_rows: dict[str, int]
) -> DataShape:
    """Replaces histories, candidates or table sizes by assumed ones; None and {} change nothing."""
    notes = list(shape.notes)
    if mean_history is not None:
        shape = dataclasses.replace(shape, history=mean_history, context=(mean_history + 1) / 2)
        notes.append(f"every history has {mean_history:g} tokens (--mean_history)")
    if candidates is not None:
        shape = dataclasses.replace(shape, candidates=candidates)
        notes.append(f"{candidates:g} candidates per request (--candidates)")
    if table_rows:
        notes.append(f"rows of {sorted(table_rows)} (--table_rows) count as equally frequent: the most exchange")
    counts = {name: count for name, count in shape.counts.items() if name not in table_rows}
    return dataclasses.replace(shape, counts=counts, notes=tuple(notes))


def with_table_rows(manifest: Manifest, table_rows: dict[str, int]) -> Manifest:
    """Replaces table sizes of the manifest. ValueError for a table that is not in it or would have no known row."""
    known = [table.name for table in manifest.tables]
    problems = [f"there is no table {name!r}, the data set has {known}" for name in table_rows if name not in known]
    problems += [
        f"{name}={rows}: a table has at least {NUM_RESERVED_ROWS + 1} rows (padding, unknown and one known)"
        for name, rows in table_rows.items()
        if rows <= NUM_RESERVED_ROWS
    ]
    if problems:
        raise ValueError("--table_rows: " + "; ".join(problems))
    tables = tuple(
        dataclasses.replace(table, num_rows=table_rows.get(table.name, table.num_rows)) for table in manifest.tables
    )
    return dataclasses.replace(manifest, tables=tables)


def training_requests(run: RunConfig, shape: DataShape, world_size: int) -> float:
    """Counts the requests of one rank in a training step."""
    if run.data.global_batch_rows:
        return run.data.global_batch_rows / world_size
    return run.data.global_batch_tokens / max(shape.history, 1.0) / world_size


def workload(
    run: RunConfig, manifest: Manifest, sharded: tuple[str, ...], shape: DataShape, requests: float
) -> Workload:
    """Estimates a training step with that many requests on the rank; `sharded` names the tables that are looked up."""
    is_pretraining = run.stage == "pretrain"
    tokens, candidates = requests * shape.history, 0.0 if is_pretraining else requests * shape.candidates
    sets = {
        "group": run.pretrain.num_negative_groups * run.train.micro_batches,  # every micro-batch draws its own
        "request": requests,
        "position": max(tokens - requests, 0.0),
    }[run.pretrain.negatives_per]
    negatives = round(sets * run.pretrain.num_negatives) if is_pretraining else 0
    draws = dict.fromkeys(sharded, 0.0)
    entries = {"history": tokens, "candidate": candidates, "context": 0.0 if is_pretraining else requests}
    for place, count in entries.items():
        for feature in manifest.features_in(place):
            if feature.table in draws:
                draws[feature.table] += count * (shape.bag_sizes[feature.name] if feature.is_bag else 1.0)
    item_table = manifest.feature(manifest.item_feature).table
    unique_rows = {
        name: expected_distinct(
            manifest.table(name).num_rows - NUM_RESERVED_ROWS,
            drawn,
            shape.counts.get(name),
            negatives if name == item_table else 0,
        )
        for name, drawn in draws.items()
    }
    return Workload(requests, tokens, candidates, shape.context, negatives, unique_rows)


def expected_distinct(num_rows: int, draws: float, counts: np.ndarray | None = None, uniform_draws: float = 0) -> float:
    """Expects this many distinct rows from `draws` by frequency `counts` (or uniform) and `uniform_draws` uniform ones.

    Draws are taken as independent: sum over rows of 1 - (1 - p)^draws (1 - 1 / num_rows)^uniform_draws.
    """
    if num_rows <= 1:
        return float(min(num_rows, 1) if draws + uniform_draws > 0 else 0)
    miss_uniform = np.log1p(-1 / num_rows)
    if counts is None or not counts.sum():
        return float(-num_rows * np.expm1((draws + uniform_draws) * miss_uniform))
    share = np.minimum(counts / counts.sum(), 1 - 1e-12)
    logs = draws * np.log1p(-share) + uniform_draws * miss_uniform
    unseen = num_rows - len(counts)
    return float(-np.expm1(logs).sum() - unseen * np.expm1(uniform_draws * miss_uniform))


def _vocabulary_counts(folder: pathlib.Path, manifest: Manifest) -> dict[str, np.ndarray]:
    counts = {}
    for table in manifest.tables:
        path = folder / "vocab" / f"{table.name}.parquet"
        if path.is_file():
            counts[table.name] = pq.read_table(path, columns=["count"])["count"].to_numpy().astype(np.float64)
    return counts


def _sample(
    folder: pathlib.Path, files: tuple[str, ...], bags: list[Feature], with_candidates: bool
) -> pa.Table | None:
    """Reads lengths and bags of the first rows of the first file; None if it is not on this disk."""
    if not files or not (folder / files[0]).is_file():
        return None
    places = ("history", "candidate", "context") if with_candidates else ("history",)
    columns = ["history_length", *(f"{p}.{feature.name}" for feature in bags for p in places if p in feature.places)]
    batches = pq.ParquetFile(folder / files[0]).iter_batches(batch_size=_SAMPLE_ROWS, columns=columns)
    first = next(batches, None)
    return None if first is None or not len(first) else pa.Table.from_batches([first])


def _mean_bag(sample: pa.Table, feature: Feature) -> float:
    """Averages the size of a feature's bags over all roles that were read."""
    bags = rows = 0
    for place in feature.places:
        name = f"{place}.{feature.name}"
        if name in sample.column_names:
            column = sample[name].combine_chunks()
            values = column if place == "context" else column.flatten()
            bags += len(values)
            rows += pc.sum(pc.list_value_length(values)).as_py() or 0
    return rows / bags if bags else 1.0
