"""Reruns reported results and compares them with what is expected: `make experiments`, or

    python -m benchmarks.experiments --raw_root DIR      # DIR/amazon_grocery/, kuairand_pure/, movietweetings/
    python -m benchmarks.experiments --reduced           # synthetic data, about a minute
    python -m benchmarks.experiments --names grocery/st_sf

configs/experiments/expected.json lists the experiments (fields: `expected.Experiment`). Each is one run of
`gpsd_dist.train` and one of `gpsd_dist.evaluate` in OUT_DIR/NAME, after those that it needs. A finished one is kept
while its options and data are the same, an interrupted one goes on; reduced ones always start anew, because they check
the code. Exit status 1 if a result is off or a command failed, 2 if nothing was checked.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import rich.console
import rich.table

from benchmarks.expected import (
    FAILED,
    MISS,
    PASS,
    RAW_SOURCES,
    SKIPPED,
    SYNTHETIC,
    Experiment,
    Result,
    exit_status,
    judge,
    ordered,
    read_experiments,
)
from gpsd_dist.config.gin_cli import load_run_config
from gpsd_dist.data import data_versions
from gpsd_dist.schema import read_manifest

_REPO_ROOT = pathlib.Path(__file__).resolve().parents[1]
_RECORD = "experiment.json"  # in the folder of an experiment: its configuration, and its metrics once it is finished


def run_all(chosen: list[Experiment], raw_root: pathlib.Path, out_dir: pathlib.Path) -> list[Result]:
    """Runs experiments in order; results.json is written after each. What cannot run is skipped, or has failed, and
    says why.
    """
    problem_of_data: dict[str, tuple[str, str] | None] = {}  # data -> verdict and why
    results: dict[str, Result] = {}
    for experiment in chosen:
        if experiment.data not in problem_of_data:
            problem_of_data[experiment.data] = prepare_data(experiment.data, raw_root, out_dir)
        problem = problem_of_data[experiment.data]
        missing = [name for name in experiment.dependencies() if results[name].found is None]
        if problem is None and missing:
            problem = SKIPPED, f"needs {', '.join(missing)}, which gave no result"
        results[experiment.name] = Result(experiment, *problem) if problem else _attempt(experiment, out_dir)
        _write(list(results.values()), out_dir / "results.json")
    return list(results.values())


def prepare_data(data: str, raw_root: pathlib.Path, out_dir: pathlib.Path) -> tuple[str, str] | None:
    """Builds data that are missing or out of date. Returns None, or why there are no data: SKIPPED or FAILED, and the
    reason.
    """
    raw_name, options = RAW_SOURCES.get(data, (data, "--source synthetic"))
    raw_dir = (out_dir / "raw" if data in SYNTHETIC else raw_root) / raw_name
    if data not in SYNTHETIC and not raw_dir.is_dir():
        return SKIPPED, f"no raw data: {raw_dir} does not exist (--raw_root)"
    target = str(_data_dir(out_dir, data))
    try:
        if data in SYNTHETIC:
            _python("data_pipeline.synthesize", "--out_dir", str(raw_dir), *SYNTHETIC[data].split())
        _python("data_pipeline.build", *options.split(), "--raw_dir", str(raw_dir), "--out_dir", target)
    except subprocess.CalledProcessError as error:
        return FAILED, _failure(error)
    return None


def _attempt(experiment: Experiment, out_dir: pathlib.Path) -> Result:
    try:
        return run_experiment(experiment, out_dir)
    except subprocess.CalledProcessError as error:
        return Result(experiment, FAILED, _failure(error))
    except ValueError as error:
        return Result(experiment, FAILED, str(error))


def run_experiment(experiment: Experiment, out_dir: pathlib.Path) -> Result:
    """Trains and scores, or keeps finished results. subprocess.CalledProcessError names the command that failed;
    ValueError: options that do not fit, or a folder with other things in it.
    """
    folder = out_dir / experiment.name
    configuration = _configuration(experiment, out_dir)
    record = earlier_record(folder)
    if record and (experiment.reduced or record["configuration"] != configuration):
        _say(f"\n{folder}: {'a reduced one' if experiment.reduced else 'other options or data'}, starts anew")
        shutil.rmtree(folder)
        record = {}
    if "metrics" in record:
        return judge(experiment, record["metrics"], record["minutes"], note="kept")
    folder.mkdir(parents=True, exist_ok=True)
    record_file, metrics_file = folder / _RECORD, folder / f"{experiment.split}.json"
    record_file.write_text(json.dumps({"configuration": configuration}, indent=1) + "\n")
    started_s = time.monotonic()
    _python("gpsd_dist.train", *train_arguments(experiment, out_dir))
    scored = ("--checkpoint", str(folder), "--data", str(_data_dir(out_dir, experiment.data)))
    _python("gpsd_dist.evaluate", *scored, "--split", experiment.split, "--metrics_out", str(metrics_file))
    minutes, metrics = (time.monotonic() - started_s) / 60, json.loads(metrics_file.read_text())
    finished = {"configuration": configuration, "metrics": metrics, "minutes": minutes}
    record_file.write_text(json.dumps(finished, indent=1) + "\n")
    return judge(experiment, metrics, minutes)


def earlier_record(folder: pathlib.Path) -> dict:
    """Reads the record of an earlier call; empty without one. ValueError if the folder holds something else."""
    if not folder.exists():
        return {}
    if not (folder / _RECORD).is_file():
        raise ValueError(f"{folder} exists and is not of this command: move it, or choose another --out_dir")
    return json.loads((folder / _RECORD).read_text())


def _configuration(experiment: Experiment, out_dir: pathlib.Path) -> dict:
    """Collects everything that decides the result: all options of the run, the runs it needs, the data, and how it is
    scored.
    """
    run = load_run_config(train_arguments(experiment, out_dir)).run
    configuration = {
        "run": dataclasses.asdict(run),
        "data": read_manifest(data_versions.current(run.data_dir)).options["fingerprint"],
        "split": experiment.split,
        "needs": {name: earlier_record(out_dir / name) for name in experiment.dependencies()},
    }
    return json.loads(json.dumps(configuration))


def train_arguments(experiment: Experiment, out_dir: pathlib.Path) -> list[str]:
    folders = {"DATA_DIR": _data_dir(out_dir, experiment.data), "OUTPUT_DIR": out_dir / experiment.name}
    if experiment.needs:
        folders["INIT_CHECKPOINT"] = out_dir / experiment.needs
    if experiment.refit_of:
        folders["REFIT_OF"] = out_dir / experiment.refit_of
    settings = [f"--gin.{name}={folder}" for name, folder in folders.items()]
    return ["--gin_file", experiment.gin_file, *settings, *experiment.overrides]


def _data_dir(out_dir: pathlib.Path, data: str) -> pathlib.Path:
    return out_dir / "data" / data


def _python(module: str, *options: str) -> None:
    """Shows a command, so that it can be typed again, and runs it."""
    command = [sys.executable, "-m", module, *options]
    _say(f"\n$ {shlex.join(['python', *command[1:]])}")
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    subprocess.run(command, check=True, cwd=_REPO_ROOT, env=environment, stdin=subprocess.DEVNULL)


def _failure(error: subprocess.CalledProcessError) -> str:
    return f"status {error.returncode}: {shlex.join(['python', *error.cmd[1:]])}"


def _say(text: str) -> None:
    print(text, flush=True)


def _write(results: list[Result], path: pathlib.Path) -> None:
    aside = path.with_suffix(".json.tmp")
    aside.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n")
    aside.replace(path)


def table(results: list[Result]) -> rich.table.Table:
    """Makes one row per experiment; minutes in brackets are those expected."""
    made = rich.table.Table("experiment", "split", "metric", title="Expected and found")
    for column in ("expected", "tolerance", "found", "verdict", "minutes", "note"):
        made.add_column(column, justify="left" if column in ("verdict", "note") else "right")
    for result in results:
        e = result.experiment
        found = "-" if result.found is None else f"{result.found:.4f}"
        minutes = f"({e.minutes:.1f})" if result.minutes is None else f"{result.minutes:.1f}"
        cells = (f"{e.expected:.4f}", f"{e.tolerance:.4f}", found, result.verdict, minutes, result.note)
        made.add_row(e.name, e.split, e.metric, *cells)
    return made


def main(argv: list[str]) -> int:
    """Parses the command line and runs the experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw_root", type=pathlib.Path, default=pathlib.Path("data/raw"), help="folder of raw folders")
    parser.add_argument("--out_dir", type=pathlib.Path, default=pathlib.Path("runs/experiments"))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--names", nargs="+", help="only these, and what they need")
    which.add_argument("--reduced", action="store_true", help="only the reduced ones, on small synthetic data")
    args = parser.parse_args(argv)
    try:
        experiments = read_experiments()
        names = args.names or [e.name for e in experiments if e.reduced == args.reduced]
        chosen = ordered(experiments, names)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out_dir = args.out_dir.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    results = run_all(chosen, args.raw_root.resolve(), out_dir)
    rich.console.Console(width=None if sys.stdout.isatty() else 200).print(table(results))
    counts = {verdict: sum(r.verdict == verdict for r in results) for verdict in (PASS, MISS, FAILED, SKIPPED)}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{summary}; written to {out_dir / 'results.json'}")
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
