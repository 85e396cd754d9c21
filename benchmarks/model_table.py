r"""Makes the table of models x strategies of a data set by the ordinary commands; docs/results.md shows it.

    python -m benchmarks.model_table --gin_file configs/experiments/grocery_finetune.gin \
        --models hstu,deepfm,din,dien,dmin,wukong --strategies NT,ST_SF,FT_SF --rates 1e-3,5e-3 --seeds 0,1,2 \
        --tables_from 'runs/grocery/s{seed}/pretrain' --tower_from 'runs/models/grocery/{model}/pretrain' \
        --out_dir runs/models/grocery

A model is a leaf of configs/model. For each model and strategy: one run of the first seed per dense learning rate; the
rate with the best value on `valid` and the length of that run are kept; then REFIT_OF trains on train + valid with
every seed, and `test` is scored once with each. ST takes tables from --tables_from, FT all weights from --tower_from; a
model that cannot be pretrained has no FT row. `--rates default` leaves the rate to the files. --baselines puts floors
and boosted trees above the models; the models' rows, refits, are to be compared with `gbdt_refit`. Finished runs are
kept: the same command goes on, `--print_only` prints.
A folder whose run has other options - another rate may have won since - ends the command with status 2.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time

from gpsd_dist.checkpoint import manager
from gpsd_dist.commands import execute
from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.config.model import MODELS
from gpsd_dist.scaling.ladder import Training
from gpsd_dist.scaling.runs import differences, is_trained, parameters_of, read_result, replace_file

METRICS = ("auc", "gauc", "gauc_user_day", "log_loss")
DEFAULT_RATE = "default"
WALL_NAME = "wall_s.json"


@dataclasses.dataclass(frozen=True)
class Row:
    """Names a model with a strategy."""

    model: str
    strategy: str
    args: argparse.Namespace

    @property
    def folder(self) -> pathlib.Path:
        """Lists all runs of this row."""
        return self.args.out_dir / self.model / self.strategy.lower()

    def tuning(self, rate: str) -> Training:
        """Trains on `train` and validates, with the first seed."""
        return self._training(self.args.seeds[0], rate, self.folder / f"tune_{rate}")

    def refit(self, rate: str, seed: int) -> Training:
        """Trains on train + valid for as long as the tuning run took to its best validation."""
        of = f"--gin.REFIT_OF={self.tuning(rate).folder}"
        return self._training(seed, rate, self.folder / f"s{seed}", of)

    def _training(self, seed: int, rate: str, folder: pathlib.Path, *more: str) -> Training:
        files = (*self.args.gin_file, f"configs/model/{self.model}.gin")
        options = [f"--gin.{text}" for text in self.args.gin]
        options += [f"--gin.STRATEGY={self.strategy}", f"--gin.SEED={seed}"]
        options += [] if rate == DEFAULT_RATE else [f"--gin.DENSE_LR={rate}"]
        if self.strategy != "NT":
            template = self.args.tower_from if self.strategy.startswith("FT") else self.args.tables_from
            options.append(f"--gin.INIT_CHECKPOINT={template.format(seed=seed, model=self.model)}")
        arguments = [part for file in files for part in ("--gin_file", file)]
        arguments += [*options, *more, f"--gin.OUTPUT_DIR={folder}"]
        return Training(load_run_config(arguments).run, ("-m", "gpsd_dist.train", *arguments))


def rows_of(args: argparse.Namespace) -> list[Row]:
    """Lists every combination that exists; a model without generative form has neither FT nor FT_SF."""
    rows = []
    for model in args.models:
        for strategy in args.strategies:
            row = Row(model, strategy, args)
            name = Row(model, "NT", args).tuning(args.rates[0]).run.model.name
            if strategy.startswith("FT") and not MODELS[name].is_generative:
                print(f"{model} {strategy}: {name} cannot be pretrained, so there is no tower to take over", flush=True)
                continue
            rows.append(row)
    return rows


def is_finished(training: Training) -> bool:
    """Whether the run is finished. ValueError if the folder holds a run with other options."""
    config = training.folder / "run_config.json"
    changes = differences(training, json.loads(config.read_text())) if config.is_file() else []
    if changes:
        raise ValueError(
            f"{training.folder} holds a run with other options: {'; '.join(changes)}; use the same options, another "
            "--out_dir, or delete that folder"
        )
    return is_trained(training)


def train(training: Training) -> None:
    """Runs the command if its run is not finished, and notes its wall time in seconds."""
    if is_finished(training):
        return
    start_s = time.monotonic()
    execute(training.command, say=functools.partial(print, flush=True))
    path = training.folder / WALL_NAME
    before = json.loads(path.read_text()) if path.is_file() else 0.0
    replace_file(path, json.dumps(round(before + time.monotonic() - start_s, 1)).encode())


def valid_value(training: Training) -> float:
    """Reads the best validation of a finished run, by the metric that chose its checkpoint."""
    return manager.read_state(manager.find(training.folder)).progress["best_value"]


def run(row: Row) -> None:
    """Runs everything that a row needs and does not have yet. subprocess.CalledProcessError if a command fails."""
    for rate in row.args.rates:
        train(row.tuning(rate))
    rate = best_rate(row)
    for seed in row.args.seeds:
        training = row.refit(rate, seed)
        train(training)
        source = ("--checkpoint", str(training.folder), "--data", training.run.data_dir)
        score(training.folder / "test.json", row.args.min_item_count, *source)


def score(result: pathlib.Path, min_item_count: int | None, *source: str) -> None:
    """Scores `test` with a run or a baseline, if that has not been done."""
    if read_result(result) is None:
        counted = () if min_item_count is None else ("--min_item_count", str(min_item_count))
        command = ("-m", "gpsd_dist.evaluate", *source, *counted, "--split", "test", "--metrics_out", str(result))
        execute(command, say=functools.partial(print, flush=True))


def baseline_results(rows: list[Row], args: argparse.Namespace) -> dict[str, pathlib.Path]:
    """Names the files of the baselines; scores what is missing, unless only a table is asked for."""
    files = {name: args.out_dir / "baselines" / name / "test.json" for name in args.baselines}
    if not args.print_only and rows:
        data_dir = rows[0].tuning(args.rates[0]).run.data_dir
        for name, file in files.items():
            score(file, args.min_item_count, "--baseline", name, "--data", data_dir)
    return files


def best_rate(row: Row) -> str:
    """Chooses the dense learning rate whose run had the best validation."""
    return max(row.args.rates, key=lambda rate: valid_value(row.tuning(rate)))


def table(rows: list[Row], baselines: dict[str, pathlib.Path], min_item_count: int | None) -> list[str]:
    """Writes Markdown, one line per row and task; mean and (min - max) over seeds. Unfinished rows are left out."""
    metrics = METRICS if min_item_count is None else (*METRICS, f"auc_item_count@{min_item_count}")
    heads = ("model", "strategy", "task", "rate", "valid", "seeds", *metrics, "dense parameters", "s per refit")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, file in baselines.items():
        for task, values in (read_result(file) or {}).items():
            cells = [_cell([values.get(metric)]) for metric in metrics]
            lines.append("| " + " | ".join([name, "", task, "", "", "", *cells, "", ""]) + " |")
    for row in rows:
        if not all(is_finished(row.tuning(rate)) for rate in row.args.rates):
            continue
        rate = best_rate(row)
        refits = [row.refit(rate, seed) for seed in row.args.seeds]
        found = [refit.folder for refit in refits if is_finished(refit)]
        results = {folder: result for folder in found if (result := read_result(folder / "test.json")) is not None}
        for task in next(iter(results.values()), {}):
            cells = [_cell([result[task].get(metric) for result in results.values()]) for metric in metrics]
            size = parameters_of(next(iter(results)))["dense_parameters"]
            seconds = [json.loads((folder / WALL_NAME).read_text()) for folder in results]
            valid = manager.read_state(manager.find(row.tuning(rate).folder)).metrics[f"{task}/auc"]
            facts = [row.model, row.strategy.replace("_", "&"), task, rate, f"{valid:.4f}", str(len(results))]
            lines.append("| " + " | ".join([*facts, *cells, f"{size:,}", f"{statistics.mean(seconds):.0f}"]) + " |")
    return lines


def _cell(found: list[float | None]) -> str:
    """Writes mean and range; nothing if a seed has no value, because means over different seeds do not compare."""
    values = [value for value in found if value is not None]
    if len(values) < len(found):
        return ""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ({min(values):.4f} - {max(values):.4f})"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", action="append", required=True, help="of the finetuning; repeatable")
    parser.add_argument("--gin", action="append", default=[], metavar="NAME=VALUE", help="override for all; repeatable")
    parser.add_argument("--models", required=True, type=lambda text: text.split(","))
    parser.add_argument("--strategies", default=["NT", "ST_SF", "FT_SF"], type=lambda text: text.split(","))
    parser.add_argument("--rates", default=["1e-3"], type=lambda text: text.split(","), help="dense learning rates")
    parser.add_argument("--seeds", default=[0], type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--tables_from", default="", help="pretraining for ST, ST_SF; may hold {seed} and {model}")
    parser.add_argument("--tower_from", default="", help="pretraining for FT, FT_SF; may hold {seed} and {model}")
    parser.add_argument("--baselines", default=[], type=lambda text: text.split(","), help="floors and trees")
    parser.add_argument("--min_item_count", type=int, help="also show the AUC on candidates with so many events")
    parser.add_argument("--out_dir", type=pathlib.Path, required=True)
    parser.add_argument("--print_only", action="store_true", help="train nothing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Returns 0, or 2 for a mistake in the options and a folder with other runs in it."""
    args = _parse(argv)
    try:
        rows = rows_of(args)
        if not args.print_only:
            for row in rows:
                run(row)
        print("\n".join(table(rows, baseline_results(rows, args), args.min_item_count)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
