"""Says at the end of a run how it ended, whether it is better than no model, and what to run next."""

import collections.abc
import logging
import math
import pathlib
import re
import shlex
import typing

from gpsd_dist.baselines.registry import NEXT_ITEM, WORDS, evaluate_baseline
from gpsd_dist.checkpoint import storage
from gpsd_dist.cli.names import with_plugin
from gpsd_dist.config import gin_files
from gpsd_dist.config.gin_cli import joined_values
from gpsd_dist.metrics.auc_interval import half_width_of_counts
from gpsd_dist.stages.stage import Metrics
from gpsd_dist.trainer import Trainer

log = logging.getLogger(__name__)
MAX_COUNTED = 3_000_000  # candidates whose floors are computed without being asked for: seconds
MAX_RANKED = 2 * 10**9  # targets x items, for the floor of next-item ranking
THIN = 0.05  # half width of an AUC's 95 % interval from which on runs hardly differ visibly
FLOORS: tuple[str, ...] = ("rates", "popularity")
OUTCOME_NAME = "outcome.json"
"""File of a finished run: why it ended, its best validation, and what no model reaches there. The report reads it."""
_FINETUNE = "configs/stage/finetune.gin"
_OF_THE_MODEL = re.compile(
    r"--gin\.(LAYERS|WIDTH|HEADS|EMBEDDING_DIM|MAX_HISTORY_LENGTH|TRANSFER_TABLES|(Model|Tables|Ids)Config\.\w+)="
)


def say(trainer: Trainer, best: dict[str, float], argv: list[str]) -> None:
    """Logs the outcome of a finished run, and writes it. `best`: "task/metric" -> value of its best validation.

    For rank 0 only.
    """
    name = best_metric(trainer, best) if best else ""
    outcome: dict[str, typing.Any] = {"ended": how_it_ended(trainer, name), "floors": {}, "warnings": []}
    log.info("%s", outcome["ended"])
    for level, line in _quality(trainer, best, name, outcome["floors"]) if best else ():
        log.log(level, "%s", line)
        outcome["warnings"] += [line] * (level == logging.WARNING)
    try:
        storage.write_json(pathlib.Path(trainer.run.output_dir) / OUTCOME_NAME, outcome)
    except OSError as error:  # the run is finished and safe: no reason to fail
        log.warning("%s was not written (%s): the report will not show floors on valid", OUTCOME_NAME, error)
    log.info("next: %s", with_plugin(next_command(trainer, argv)))


def best_metric(trainer: Trainer, best: dict[str, float]) -> str:
    """Names the "task/metric" that chose the best checkpoint."""
    metrics: Metrics = {}
    for name, value in best.items():
        task, metric = name.rsplit("/", 1)
        metrics.setdefault(task, {})[metric] = value
    return trainer.run.train.best_metric or trainer.components.stage.default_metric(metrics)


def how_it_ended(trainer: Trainer, name: str) -> str:
    """Says at which step the run ended, and why there. `name`: the metric that chose its best checkpoint."""
    run, stopping = trainer.run, trainer.early_stopping
    if trainer.step < trainer.total_steps:
        looks = f"no better valid {name} for {stopping.stale} looks"
        return f"stopped early at step {trainer.step} of {trainer.total_steps}: {looks}"
    if run.refit_of:
        return f"trained {trainer.step} steps on train+valid, as long as {run.refit_of} took to its best validation"
    return f"trained to its last step, {trainer.step}"


def _quality(
    trainer: Trainer, best: dict[str, float], name: str, floors_out: dict[str, float]
) -> collections.abc.Iterator[tuple[int, str]]:
    """Yields (level of logging, line): the best value, its interval and its floors, and what to worry about.

    `floors_out` gets "<baseline>/<task>/<metric>" -> its value on `valid`.
    """
    stopping, (task, metric) = trainer.early_stopping, name.rsplit("/", 1)
    value, half_width, counted = best.get(name, math.nan), math.nan, ""
    if metric == "auc":
        rows = int(best[f"{task}/rows"])
        positives = round(rows * best[f"{task}/label_rate"]) if rows else 0
        if not 0 < positives < rows:
            yield logging.WARNING, f"valid has {positives:,} positives in {rows:,} candidates: no AUC, nothing chosen"
            return
        half_width = half_width_of_counts(value, positives, rows - positives)
        counted = f" +- {half_width:.3f} ({positives:,} of {rows:,} candidates are positive)"
    yield logging.INFO, f"best valid {name} {value:.5f}{counted} at step {stopping.best_step}"
    floors, why_not = floors_of(trainer, task, metric)
    floors_out |= {f"{floor}/{name}": value for floor, value in floors.items()}
    floors = {WORDS[floor]: value for floor, value in floors.items()}
    known = ", ".join(f"{floor} {value:.5f}" for floor, value in floors.items())
    yield logging.INFO, f"without a model: {known or why_not}"
    yield from warnings(name, value, half_width, floors)
    if stopping.best_step == trainer.schedule_steps:
        yield logging.INFO, "the last validation was the best one: more EPOCHS may help"


def warnings(
    name: str, value: float, half_width: float, floors: dict[str, float]
) -> collections.abc.Iterator[tuple[int, str]]:
    """Yields a warning for data too thin to tell, a value near chance, and one below a floor."""
    if half_width > THIN:
        yield (
            logging.WARNING,
            f"too thin to tell: valid knows an AUC to +- {half_width:.3f} only (95 %), so runs that differ by less "
            "cannot be told apart; a longer valid period narrows it with the square root of its rows",
        )
    if value - half_width <= 0.5:
        yield logging.WARNING, f"valid {name} {value:.3f} is not clearly above 0.5, which is tossing a coin"
    below = {floor: known for floor, known in floors.items() if value < known}
    if below:
        strongest = max(below, key=below.__getitem__)
        yield (
            logging.WARNING,
            f"below {strongest}: {value:.4f} < {below[strongest]:.4f}. This model is worse than none: look at its "
            "curves (python -m gpsd_dist.report), and at the attributes and history lengths of the data",
        )


def floors_of(trainer: Trainer, task: str, metric: str) -> tuple[dict[str, float], str]:
    """Computes what each baseline reaches on `valid` without a model; or says why not, and how to."""
    run, manifest = trainer.run, trainer.manifest
    command = f"python -m gpsd_dist.evaluate --baseline {{}} --data {shlex.quote(run.data_dir)} --split valid"
    valid, names = manifest.split("valid"), FLOORS
    if run.stage == "pretrain":
        items = manifest.table(manifest.feature(manifest.item_feature).table).num_rows
        names, is_small = (NEXT_ITEM,), valid.num_candidates * items <= MAX_RANKED
    else:
        is_small = valid.num_candidates + manifest.split("train").num_candidates <= MAX_COUNTED
    if not is_small:
        return {}, command.format(names[0])
    try:
        scores: dict[str, Metrics] = {}
        for name in names:
            longest = run.data.max_history_length if name == NEXT_ITEM else None
            tasks = None if name == NEXT_ITEM else [task]
            is_weighted = run.finetune.weighted_metrics and "weight" in manifest.sampling
            scores[name] = evaluate_baseline(
                name, run.data_dir, "valid", tasks, max_history_length=longest, is_weighted=is_weighted
            )
        known = {name: scores[name][task][metric] for name in names}
    except (ValueError, KeyError, OSError) as error:
        return {}, f"not computed ({error})"
    return {name: value for name, value in known.items() if math.isfinite(value)}, "not defined"


def next_command(trainer: Trainer, argv: list[str]) -> str:
    """Gives the command that comes after this run: the finetuning of a pretraining, the scoring of a finetuning."""
    run = trainer.run
    folder = shlex.quote(run.output_dir)
    if run.stage != "pretrain":
        return f"python -m gpsd_dist.evaluate --checkpoint {folder} --split test --metrics_out {folder}/test.json"
    argv = joined_values(argv)
    files = [argument.removeprefix("--gin_file=") for argument in argv if argument.startswith("--gin_file=")]
    mine = pathlib.PurePath(files[0] if files else "-")
    mine = mine.with_name(mine.name.replace("pretrain", "finetune"))
    is_there = str(mine) not in files and gin_files.find(str(mine)) is not None
    options = [part for file in (mine if is_there else _FINETUNE, *files[1:]) for part in ("--gin_file", str(file))]
    options += [argument for argument in argv if _OF_THE_MODEL.match(argument)]
    options += [f"--gin.DATA_DIR={run.data_dir}", "--gin.STRATEGY=FT_SF", f"--gin.INIT_CHECKPOINT={run.output_dir}"]
    options += [f"--gin.OUTPUT_DIR={pathlib.Path(run.output_dir).with_name('ft_sf')}"]
    return "python -m gpsd_dist.train " + shlex.join(options)
