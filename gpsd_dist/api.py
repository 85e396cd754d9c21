"""Runs the commands from Python, for notebooks and programs.

    from gpsd_dist import api

    run = api.fit("data/mine")        # what `gpsd-dist fit --data data/mine` does
    run.table                         # every model and baseline with its metrics; a table in a notebook
    run.evaluate("test")              # {"click": {"auc": ..., "log_loss": ...}}
    run.export("artefacts/ctr")
    api.load("artefacts/ctr").score([{"history.item": ["8001"], ..., "candidate.item": ["4", "17"]}])

Mistakes are ValueErrors with the words of the command line. Importing this module imports no torch.
"""

import collections.abc
import html
import pathlib
import typing

from gpsd_dist.checkpoint import storage
from gpsd_dist.fit.__main__ import parse

if typing.TYPE_CHECKING:
    from gpsd_dist.serving.scorer import Scorer

Metrics = dict[str, dict[str, float]]
"""Task -> metric -> value."""
Options = collections.abc.Mapping[str, object]
"""Name of an option, like "EPOCHS" or "TrainConfig.bf16" -> value: `--gin.NAME=VALUE` of the command line."""
_COLUMNS = ("label", "task", "valid_auc", "auc", "auc_half_width", "gauc", "log_loss")


class Table(list[dict[str, typing.Any]]):
    """Holds one dict per row. It shows itself as a table, and `pandas.DataFrame(table)` takes it."""

    def __repr__(self) -> str:
        rows = [_COLUMNS, *(tuple(_cell(row.get(name)) for name in _COLUMNS) for row in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        cells = ("".join(f"<td>{html.escape(_cell(row.get(name)))}</td>" for name in _COLUMNS) for row in self)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


class Fit:
    """Holds the outcome of a finished `fit`, read from its folder: `Fit("runs/mine")` opens an earlier one."""

    def __init__(self, folder: str | pathlib.Path):
        """Reads `summary.json` and `fit.json`. ValueError or OSError if the fit has not finished."""
        self.folder = pathlib.Path(folder)
        if not (self.folder / "summary.json").is_file():
            raise ValueError(f"{self.folder} holds no finished fit: gpsd-dist fit --data DATA --out {self.folder}")
        self._summary = storage.read_json(self.folder / "summary.json")
        self._chosen = storage.read_json(self.folder / "fit.json")["chosen"]

    def __repr__(self) -> str:
        return f"Fit({str(self.folder)!r}): {self.verdict}"

    @property
    def verdict(self) -> str:
        """Says in one sentence whether the chosen model is better than what needs no model."""
        return self._summary["verdict"]

    @property
    def table(self) -> Table:
        """Metrics on test of every baseline and model; `auc_half_width` is half of the 95 % interval."""
        return Table([*self._summary["floors"], *self._summary["rows"], *self._summary["refit"]])

    @property
    def report(self) -> pathlib.Path:
        """HTML page with curves."""
        return self.folder / "report.html"

    def chosen(self, split: str = "test") -> pathlib.Path:
        """Returns the run folder that was chosen on `valid`; for other splits its refit, where the outcome has one.

        A refit was trained on `valid` too, so its metrics there would say nothing. ValueError if nothing was chosen.
        """
        if not self._chosen:
            raise ValueError(f"{self.folder}: nothing was trained, so nothing was chosen: {self.verdict}")
        is_refit = split != "valid" and self._summary["refit"]
        return self.folder / (f"{self._chosen}_refit" if is_refit else self._chosen)

    def evaluate(self, split: str = "test", data: str | pathlib.Path | None = None) -> Metrics:
        """Scores a split with the chosen run, in this process; `data` None: the data set that it was trained on."""
        from gpsd_dist.distributed.runtime import process_group
        from gpsd_dist.trained_run import TIMEOUT_S, evaluate_checkpoint

        with process_group(TIMEOUT_S) as runtime:
            return evaluate_checkpoint(self.chosen(split), None if data is None else str(data), split, runtime)

    def export(self, out: str | pathlib.Path, data: str | pathlib.Path | None = None) -> "Scorer":
        """Exports the run that was chosen on `valid` as an artefact, and loads it. ValueError as `gpsd-dist export`."""
        from gpsd_dist.export.exporter import export, read_source
        from gpsd_dist.export.options import Options as ExportOptions

        data = data or storage.read_json(self.folder / "fit.json")["data_dir"]
        export(read_source(str(self.chosen("valid")), str(data), "best"), str(out), ExportOptions())
        return load(out)


def fit(
    data: str | pathlib.Path,
    out: str | pathlib.Path | None = None,
    *,
    models: collections.abc.Sequence[str] = (),
    strategies: collections.abc.Sequence[str] = ("NT", "ST_SF", "FT_SF"),
    budget_minutes: float | None = None,
    nproc: int | None = None,
    seed: int = 0,
    refit: bool = True,
    gin_files: collections.abc.Sequence[str] = (),
    pretrain_gin_files: collections.abc.Sequence[str] = (),
    options: Options | None = None,
    pretrain_options: Options | None = None,
) -> Fit:
    """Does what `gpsd-dist fit` does, whose `--help` explains the arguments, and returns the outcome.

    Trainings run as processes of their own. Finished steps in `out` are kept, so a call that was interrupted goes on.

    Args:
        data: folder that `gpsd-dist build` wrote.
        out: folder for everything that is written; None: `runs/` and the name of `data`.
        models: names of files in `configs/model`; empty: a Transformer.
        strategies: of NT, ST, FT, ST_SF, FT_SF.
        budget_minutes: time to share among the trainings; None: no limit.
        nproc: processes of a training; None: one per GPU, or 2 on CPU.
        seed: of all trainings.
        refit: whether to train the chosen run again on train + valid.
        gin_files: instead of `configs/stage/finetune.gin`.
        pretrain_gin_files: instead of `configs/stage/pretrain.gin`.
        options: of the training on labels.
        pretrain_options: of the pretraining.

    ValueError for a mistake in the options or the data, subprocess.CalledProcessError if a training failed.
    """
    out = pathlib.Path("runs", pathlib.Path(data).name) if out is None else pathlib.Path(out)
    argv = ["--data", str(data), "--out", str(out), "--strategies", ",".join(strategies), "--seed", str(seed)]
    argv += ["--models", ",".join(models)] if models else []
    argv += [] if budget_minutes is None else ["--budget_minutes", str(budget_minutes)]
    argv += [] if nproc is None else ["--nproc", str(nproc)]
    argv += [] if refit else ["--no_refit"]
    for option, files in (("--gin_file", gin_files), ("--pretrain_gin_file", pretrain_gin_files)):
        argv += [part for file in files for part in (option, str(file))]
    for prefix, values in (("--gin", options), ("--pretrain_gin", pretrain_options)):
        argv += [f"{prefix}.{name}={value}" for name, value in (values or {}).items()]
    try:
        args = parse(argv)
    except SystemExit as error:  # argparse has said what is wrong
        raise ValueError(f"gpsd-dist fit {' '.join(argv)}: these options cannot be meant") from error
    from gpsd_dist.fit.procedure import run

    run(args)
    return Fit(args.out)


def load(artefact: str | pathlib.Path) -> "Scorer":
    """Loads an exported model, whose `score(requests)` gives probabilities by task and candidate. Without TorchRec."""
    from gpsd_dist.serving.scorer import load as load_scorer

    return load_scorer(artefact)
