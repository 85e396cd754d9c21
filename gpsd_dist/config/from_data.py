"""Chooses what a user leaves to the data: batch, epochs, warm-up, patience, dropout, rate, temperature and others.

A stranger's log may have a thousand requests or a billion. A batch of 512 makes four steps of an epoch of the first,
and ten epochs take weeks of the second; the rules below aim at a number of steps instead. docs/learning.md has the runs
that they were chosen by. Pretraining has ten epochs or more of any log: give EPOCHS where that is too long.
"""

import dataclasses
import math
import typing

from gpsd_dist.config.model import MODELS
from gpsd_dist.config.run import RunConfig
from gpsd_dist.config.training import DataConfig
from gpsd_dist.schema import Manifest, Split
from gpsd_dist.validation import AUTO

_OPTIONS = (
    ("data", "global_batch_rows"),
    ("train", "epochs"),
    ("train", "warmup_fraction"),
    ("train", "patience"),
    ("train", "average_fraction"),
    ("model", "dropout"),
    ("model", "matches"),
    ("model", "bag_matches"),
    ("dense", "peak_lr"),
    ("pretrain", "temperature"),
)
_MAX_WARMUP_STEPS = 500  # official settings
_RATE_WIDTH = 64  # up to this width the peak rate is the stage's; above, it falls as 1 / width (arXiv:2203.03466, Adam)
_MIN_RATE = 5e-4
# At the official 0.05 rows of rare items overfit (docs/learning.md, cause 10). Tables for a click model want more than
# what ranks the next item best.
_TEMPERATURE = {"click model": 0.2, "next item": 0.1}
_DROPOUT_PER_DOUBLING = 0.05
_MIN_PATIENCE = 3
_AVERAGE_FRACTION = 0.1  # whatever the data; 'auto', so that a run from before there was one goes on without
_MIN_BATCH_ROWS = 16
_MATCHES = True  # whatever the data: from 147 to 34,000 requests it gained 0.001 to 0.10 of valid AUC
_BLOCK_SQUARES = 12  # parameters of a Transformer block over the square of its width
_Numbers = dict[str, dict[str, typing.Any]]


@dataclasses.dataclass(frozen=True)
class _Aim:
    """Says how long a stage trains: at least this many steps, within bounds of batch and epochs."""

    batch_rows: tuple[int, int]
    steps_per_epoch: int
    """Sets the batch: it is the largest power of two that leaves an epoch this many steps, within `batch_rows`."""
    least_steps: int
    """A log too small for so many gets smaller batches than `batch_rows`, down to _MIN_BATCH_ROWS."""
    steps: int
    epochs: tuple[int, int]
    max_dropout: float
    rate: float
    """Peak rate of the dense part up to _RATE_WIDTH."""


_AIMS = {
    "pretrain": _Aim(
        batch_rows=(64, 512), steps_per_epoch=64, least_steps=0, steps=1500, epochs=(10, 15), max_dropout=0.2, rate=5e-3
    ),
    "finetune": _Aim(
        batch_rows=(64, 512), steps_per_epoch=32, least_steps=400, steps=500, epochs=(3, 16), max_dropout=0.2, rate=3e-3
    ),
}


def left_to_data(run: RunConfig) -> list[tuple[str, str]]:
    """Lists the options (part, name) that are 'auto'."""
    return [(part, name) for part, name in _OPTIONS if getattr(getattr(run, part), name) == AUTO]


def resolve(run: RunConfig, manifest: Manifest, saved: _Numbers | None = None) -> tuple[RunConfig, str]:
    """Puts a number in the place of every 'auto', and says which in one line (empty if there was none).

    `saved`: options of the run that this one resumes or repeats, as plain dicts. Its numbers are taken, so that a log
    that has grown since does not change the run under way. ValueError if one goes by requests and the other by tokens.
    """
    if saved is not None:
        _check_batched_alike(run.data, saved["data"])
    left = left_to_data(run)
    if not left:
        return run, ""
    numbers = saved if saved is not None else _choose(run, manifest)
    for part in {part for part, _ in left}:
        values = {name: numbers[part][name] for other, name in left if other == part}
        run = dataclasses.replace(run, **{part: dataclasses.replace(getattr(run, part), **values)})
    origin = "of the run before" if saved is not None else "chosen from the data"
    named = ", ".join(f"{name} {_text(getattr(getattr(run, part), name))}" for part, name in left)
    return run, f"{origin}: {named}"


def _text(value: float | bool) -> str:
    return str(value) if isinstance(value, bool) else f"{value:g}"


def _check_batched_alike(data: DataConfig, saved: dict[str, typing.Any]) -> None:
    rows, tokens = saved["global_batch_rows"], saved["global_batch_tokens"]
    if bool(tokens) == bool(data.global_batch_tokens):
        return
    given = f"{data.global_batch_tokens} history tokens" if data.global_batch_tokens else "requests"
    before = f"{tokens} history tokens" if tokens else f"{rows} requests"
    raise ValueError(
        f"a batch is {given} now (DataConfig.global_batch_tokens {data.global_batch_tokens}), but {before} in the run "
        f"that goes on or is refitted; give --gin.GLOBAL_BATCH_ROWS={rows} "
        f"--gin.DataConfig.global_batch_tokens={tokens}, or begin a run of its own in another OUTPUT_DIR"
    )


def _choose(run: RunConfig, manifest: Manifest) -> _Numbers:
    """Chooses all options of `_OPTIONS` for a run, those that are given included: the others may follow from them."""
    # A refit reads `valid` too, but its numbers are those of the run that it repeats.
    split = manifest.split("pretrain" if run.stage == "pretrain" else "train")
    aim = _aim(run)
    per_epoch = split.num_rows
    batch = run.data.global_batch_rows
    if run.data.global_batch_tokens:
        batch, per_batch, per_epoch = 0, run.data.global_batch_tokens, _tokens_seen(run, split)
    elif batch == AUTO:
        batch = per_batch = _batch_rows(aim, per_epoch)
    else:
        per_batch = batch
    steps = max(1, -(-per_epoch // per_batch))
    epochs = run.train.epochs if run.train.epochs != AUTO else _within(aim.epochs, -(-aim.steps // steps))
    warmup = min(0.1, _MAX_WARMUP_STEPS / (steps * epochs))
    rate = max(_MIN_RATE, aim.rate * min(1.0, _RATE_WIDTH / run.model.width))
    return {
        "data": {"global_batch_rows": batch},
        "train": {
            "epochs": epochs,
            "warmup_fraction": warmup,
            "patience": _patience(run, manifest, epochs),
            "average_fraction": _AVERAGE_FRACTION,
        },
        "model": {"dropout": _dropout(run, manifest), "matches": _MATCHES, "bag_matches": _MATCHES},
        "dense": {"peak_lr": rate},
        "pretrain": {"temperature": _TEMPERATURE["click model" if manifest.tasks else "next item"]},
    }


def _patience(run: RunConfig, manifest: Manifest, epochs: int) -> int:
    """Waits for a third of the run: some laws, such as an order, show only after a long plateau at 0.5.

    0 where nothing is validated.
    """
    if run.refit_of or manifest.split("valid").num_rows == 0:
        return 0
    return max(_MIN_PATIENCE, math.ceil(epochs * run.train.eval_per_epoch / 3))


def _batch_rows(aim: _Aim, rows: int) -> int:
    batch = _within(aim.batch_rows, 2 ** (max(1, rows // aim.steps_per_epoch).bit_length() - 1))
    while batch > _MIN_BATCH_ROWS and -(-rows // batch) * aim.epochs[1] < aim.least_steps:
        batch //= 2
    return batch


def _aim(run: RunConfig) -> _Aim:
    return _AIMS["pretrain" if run.stage == "pretrain" else "finetune"]


def _dropout(run: RunConfig, manifest: Manifest) -> float:
    """Drops more, the more parameters there are for each example: nothing below one of each."""
    layers = run.model.layers if "layers" in MODELS[run.model.name].reads else 1
    num_parameters = _BLOCK_SQUARES * layers * run.model.width**2
    if run.stage == "pretrain":
        # Each token is an example, and the tables are trained by nothing else.
        num_examples = _tokens_seen(run, manifest.split("pretrain"))
        num_parameters += run.tables.embedding_dim * sum(table.num_rows for table in manifest.tables)
    else:
        num_examples = manifest.split("train").num_candidates
    doublings = math.log2(num_parameters / max(1, num_examples))
    return round(min(_aim(run).max_dropout, max(0.0, _DROPOUT_PER_DOUBLING * doublings)), 1)


def _tokens_seen(run: RunConfig, split: Split) -> int:
    """Bounds the history tokens that the model sees in an epoch: only its last ones, where histories are longer."""
    return min(split.num_history_tokens, split.num_rows * run.data.max_history_length)


def _within(bounds: tuple[int, int], value: int) -> int:
    return max(bounds[0], min(bounds[1], value))
