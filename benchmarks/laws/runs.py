"""Trains and scores one cell (law, tower, strategy, seed) by the documented commands, in this process.

    python -m gpsd_dist.train --gin_file configs/stage/finetune.gin --gin_file configs/model/TOWER.gin
        --gin.DATA_DIR=... --gin.OUTPUT_DIR=... --gin.STRATEGY=... --gin.SEED=... [--gin.INIT_CHECKPOINT=...]
    python -m gpsd_dist.evaluate --checkpoint ... --split test --metrics_out ...

The `main` of both commands is called, so that imports are paid for once; nothing else differs. A strategy other than NT
starts from one pretraining (stage and model file, seed 0) per law and tower.
"""

import collections.abc
import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
import time
import traceback

import torch.distributed as dist

from benchmarks.laws import dataset, mlp
from benchmarks.laws.dataset import LawData
from benchmarks.laws.expression import unseen
from benchmarks.laws.generators import LAWS
from gpsd_dist import evaluate, train
from gpsd_dist.baselines.registry import evaluate_baseline
from gpsd_dist.config.from_data import resolve
from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.config.model import MODELS
from gpsd_dist.distributed import exit_codes
from gpsd_dist.schema import read_manifest

BASELINES = ("explicit", "gbdt", "mlp")
TOWERS = ("l1h32a4", "l4h64a4", "hstu", "sasrec_ml1m", "din", "dien", "deepfm", "dmin", "wukong")
STRATEGIES = ("NT", "ST_SF", "FT_SF")
_RECORD = "cell.json"
_NEAR = 0.9  # part of the final share whose step is reported


@dataclasses.dataclass(frozen=True)
class Cell:
    """Names one trained model, or one baseline (strategy "")."""

    law: str
    tower: str
    """Stem of a file in configs/model, or one of BASELINES."""
    strategy: str = "NT"
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.law} {self.tower} {self.strategy or '-'} s{self.seed}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds gin bindings, NAME=VALUE, that change the defaults."""

    both: tuple[str, ...] = ()
    pretrain: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()


def cells(
    laws: collections.abc.Iterable[str],
    towers: collections.abc.Iterable[str],
    strategies: collections.abc.Iterable[str],
    seeds: collections.abc.Iterable[int],
) -> list[Cell]:
    """Lists the cells of a table; a tower that cannot pretrain has NT alone, and only the MLP has seeds."""
    found = []
    for law in laws:
        for tower in towers:
            if tower in BASELINES:
                found += [Cell(law, tower, "", seed) for seed in (seeds if tower == "mlp" else (0,))]
                continue
            able = [s for s in strategies if s == "NT" or MODELS[model_of(tower)].is_generative]
            found += [Cell(law, tower, strategy, seed) for strategy in able for seed in seeds]
    return found


def model_of(tower: str) -> str:
    """Reads which model a tower's file configures. ValueError if there is no such file."""
    argv = _train_argv("finetune", tower, {"DATA_DIR": "-", "OUTPUT_DIR": "-"})
    return load_run_config(argv).run.model.name


def run_cell(cell: Cell, made: LawData, out_dir: pathlib.Path, settings: Settings) -> dict:
    """Trains and scores a cell, or reads the record of a finished one of the same options and data.

    The record has "auc" and "ceiling" by split, "share", "curve" (step, valid AUC), "steps_to_near", "cpu_s" and
    "why_not"; or "failed", with the reason.
    """
    folder = out_dir / "runs" / cell.law / cell.tower / (cell.strategy or "baseline") / f"s{cell.seed}"
    configuration = _configuration(cell, made, folder, out_dir, settings)
    record_file = folder / _RECORD
    if record_file.is_file():
        record = json.loads(record_file.read_text())
        if record["configuration"] == configuration and "failed" not in record:
            return record
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        if cell.tower not in BASELINES and cell.strategy != "NT":
            _pretrain(cell, made, out_dir, settings)
        started_s = time.process_time()
        score = _baseline if cell.tower in BASELINES else _trained
        curve, best_valid, test_auc = score(cell, made, folder, out_dir, settings)
    except ValueError as error:
        record = {"failed": str(error)}
    else:
        record = _record(made, curve, best_valid, test_auc, time.process_time() - started_s)
        model = configuration.get("run", {}).get("model", {})
        record["why_not"] = unseen(cell.law, model["name"], model["matches"]) if model else ""
    record = {**dataclasses.asdict(cell), **record, "configuration": configuration}
    record_file.write_text(json.dumps(record, indent=1) + "\n")
    return record


def finished(out_dir: pathlib.Path) -> list[dict]:
    """Reads the records of all finished cells of a folder, in the order of a full table."""
    records = [json.loads(path.read_text()) for path in out_dir.glob(f"runs/*/*/*/s*/{_RECORD}")]
    places = [list(names) for names in (LAWS, (*BASELINES, *TOWERS), ("", "NT", "ST", "FT", "ST_SF", "FT_SF"))]

    def place(record: dict) -> list:
        names = [record[key] for key in ("law", "tower", "strategy")]
        known = [order.index(name) if name in order else len(order) for name, order in zip(names, places)]
        return [*known, names, record["seed"]]

    return sorted((record for record in records if "failed" not in record), key=place)


def _record(made: LawData, curve: list[list], best_valid: float, test_auc: float, cpu_s: float) -> dict:
    ceilings = {split: dataset.ceiling(made, split) for split in ("valid", "test")}
    near = 0.5 + _NEAR * (best_valid - 0.5)
    return {
        "task": made.task,
        "ceiling": ceilings,
        "auc": {"valid": best_valid, "test": test_auc},
        "share": dataset.share(test_auc, ceilings["test"]),
        "valid_share": dataset.share(best_valid, ceilings["valid"]),
        "curve": curve,
        "steps_to_near": next((step for step, auc in curve if auc >= near), None),
        "cpu_s": cpu_s,
    }


def _configuration(cell: Cell, made: LawData, folder: pathlib.Path, out_dir: pathlib.Path, settings: Settings) -> dict:
    """Collects what decides the result: options and data."""
    configuration = {"data": read_manifest(made.data_dir).options["fingerprint"]}
    if cell.tower not in BASELINES:
        runs = {"run": _finetune_argv(cell, made, folder, out_dir, settings)}
        if cell.strategy != "NT":
            runs["pretrain"] = _pretrain_argv(cell, made, out_dir, settings)
        configuration |= {name: _resolved(argv, made) for name, argv in runs.items()}
    return json.loads(json.dumps(configuration))


def _resolved(argv: list[str], made: LawData) -> dict:
    """Lists all options of a run, with the numbers that follow from the data."""
    return dataclasses.asdict(resolve(load_run_config(argv).run, read_manifest(made.data_dir))[0])


def _trained(cell: Cell, made: LawData, folder: pathlib.Path, out_dir: pathlib.Path, settings: Settings):
    _command(train.main, _finetune_argv(cell, made, folder, out_dir, settings), folder)
    scored = folder / "test.json"
    _command(evaluate.main, ["--checkpoint", str(folder), "--split", "test", "--metrics_out", str(scored)], folder)
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = read_manifest(made.data_dir).tasks[0].name  # chooses the checkpoint, also where the law is about another
    looks = [entry for entry in entries if f"valid/{first}/auc" in entry]
    best = max(looks, key=lambda entry: entry[f"valid/{first}/auc"])
    shutil.rmtree(folder / "checkpoints")  # hundreds of cells; a record is all that the table needs
    curve = [[entry["step"], entry[f"valid/{made.task}/auc"]] for entry in looks]
    return curve, best[f"valid/{made.task}/auc"], json.loads(scored.read_text())[made.task]["auc"]


def _pretrain(cell: Cell, made: LawData, out_dir: pathlib.Path, settings: Settings) -> None:
    """Pretrains a tower on a law, once for all strategies and seeds; with other options or data anew."""
    folder, argv = _pretrain_folder(cell, out_dir), _pretrain_argv(cell, made, out_dir, settings)
    fingerprint = read_manifest(made.data_dir).options["fingerprint"]
    wanted = json.loads(json.dumps([_resolved(argv, made), fingerprint]))
    record_file = folder / _RECORD
    if record_file.is_file() and json.loads(record_file.read_text()) == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _command(train.main, argv, folder)
    record_file.write_text(json.dumps(wanted) + "\n")


def _baseline(cell: Cell, made: LawData, folder: pathlib.Path, out_dir: pathlib.Path, settings: Settings):
    if cell.tower == "mlp":
        curve, test_auc = mlp.score_mlp(made.data_dir, made.task, cell.seed)
        return curve, max(auc for _, auc in curve), test_auc
    if cell.tower == "explicit":
        return [], dataset.explicit_auc(made, "valid"), dataset.explicit_auc(made, "test")
    scores = [evaluate_baseline(cell.tower, made.data_dir, split, [made.task]) for split in ("valid", "test")]
    valid_auc, test_auc = (score[made.task]["auc"] for score in scores)
    return [], valid_auc, test_auc


def _finetune_argv(
    cell: Cell, made: LawData, folder: pathlib.Path, out_dir: pathlib.Path, settings: Settings
) -> list[str]:
    macros = {"DATA_DIR": made.data_dir, "OUTPUT_DIR": folder, "STRATEGY": cell.strategy, "SEED": cell.seed}
    if cell.strategy != "NT":
        macros["INIT_CHECKPOINT"] = _pretrain_folder(cell, out_dir)
    return _train_argv("finetune", cell.tower, macros, *settings.both, *settings.finetune)


def _pretrain_argv(cell: Cell, made: LawData, out_dir: pathlib.Path, settings: Settings) -> list[str]:
    macros = {"DATA_DIR": made.data_dir, "OUTPUT_DIR": _pretrain_folder(cell, out_dir)}
    return _train_argv("pretrain", cell.tower, macros, *settings.both, *settings.pretrain)


def _pretrain_folder(cell: Cell, out_dir: pathlib.Path) -> pathlib.Path:
    return out_dir / "runs" / cell.law / cell.tower / "pretrain"


def _train_argv(stage: str, tower: str, macros: dict[str, object], *bindings: str) -> list[str]:
    files = ["--gin_file", f"configs/stage/{stage}.gin", "--gin_file", f"configs/model/{tower}.gin"]
    return [*files, *(f"--gin.{name}={value}" for name, value in macros.items()), *(f"--gin.{b}" for b in bindings)]


def _command(main: collections.abc.Callable[[list[str]], int], argv: list[str], folder: pathlib.Path) -> None:
    """Calls a command; what it says goes to log.txt. ValueError with the last line if its status is not 0."""
    log_file = folder / "log.txt"
    with log_file.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            status = main(argv)
        except Exception:  # a table of hours shall not end with one cell, whatever was wrong with it
            traceback.print_exc()
            status = 1
    logging.getLogger("gpsd_dist").handlers.clear()  # they write into the file that is closed now
    if dist.is_initialized():
        dist.destroy_process_group()  # a command that fails leaves that to the end of its process
    if status in (exit_codes.STOPPED, exit_codes.INTERRUPTED):
        raise SystemExit(status)  # the signal was meant for the whole table
    if status:
        raise ValueError(f"status {status}: {log_file.read_text().splitlines()[-1]}")
