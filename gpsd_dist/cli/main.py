"""Starts a subcommand of `gpsd-dist`, on several processes where that is asked for, and says what is not installed."""

import collections.abc
import difflib
import importlib
import os
import sys

import gpsd_dist
from gpsd_dist.cli.missing import say_missing
from gpsd_dist.cli.names import COMMANDS, ON_SEVERAL_PROCESSES, PLUGIN, PROGRAM, STARTED_BY

_OF_THE_LAUNCHER = {"--nproc": 1, "--max_restarts": 0}  # option -> default, which is also the least
_OF_ONE_PROCESS = ("artefact", "baseline")  # options of `predict` and `evaluate`
MISTAKE = 2  # `distributed.exit_codes`, which imports more than this needs


def main(argv: list[str] | None = None) -> int:
    """Runs `gpsd-dist ARGV` and returns the status of the subcommand; 2 if there is none of that name."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0
    if name == "--version":
        sys.stdout.write(f"{PROGRAM} {gpsd_dist.__version__}\n")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"; did you mean '{near[0]}'?" if near else ""
        return _mistake(f"there is no command {name!r}{meant}\n{PROGRAM} --help lists them")
    os.environ[STARTED_BY] = PROGRAM  # children, among them the ranks, word their messages the same way
    taken, rest = _taken(rest, ("--plugin", *(_OF_THE_LAUNCHER if name in ON_SEVERAL_PROCESSES else ())))
    try:
        if "--plugin" in taken:
            os.environ[PLUGIN] = _existing(taken["--plugin"])
        num_processes, max_restarts = (_number(taken, option, default) for option, default in _OF_THE_LAUNCHER.items())
    except ValueError as error:
        return _mistake(str(error))
    return run_main(lambda options: _dispatch(name, options, num_processes, max_restarts), rest, name)


def overview() -> str:
    """Makes the page of `gpsd-dist --help`: a line per command, in the order of use."""
    width = max(map(len, COMMANDS))
    lines = "".join(f"  {name:{width}}  {command.summary}\n" for name, command in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND ...      {PROGRAM} COMMAND --help lists its options\n\n{lines}\n"
        "  --plugin FILE, after train, fit, evaluate, export, serve, ...: a Python file with models of your own\n"
    )


def run_main(command: collections.abc.Callable[[list[str]], int], argv: list[str] | None = None, name: str = "") -> int:
    """Runs the `main` of the command `name`. A package that is not installed becomes one sentence and status 2."""
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except ModuleNotFoundError as error:
        return say_missing(error, name)


def _dispatch(name: str, options: list[str], num_processes: int, max_restarts: int) -> int:
    module = importlib.import_module(COMMANDS[name].module)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{COMMANDS[name].module}.__main__")
    sys.argv = [str(module.__file__), *options]  # as `python -m` has it; runs keep it
    if num_processes == 1 and not max_restarts:
        return module.main(options)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Before the options are read: they may run the user's plug-in, which imports torch, which reads this once.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    try:
        parsed = module.parse(options)  # a mistake is said here, once, and before torch is imported
    except (ValueError, OSError) as error:
        return importlib.import_module("gpsd_dist.disk.text").say_error(error)
    alone = next((option for option in _OF_ONE_PROCESS if getattr(parsed, option, None)), "")
    if alone:
        return _mistake(f"--{alone} is scored by one process: leave out {' and '.join(_OF_THE_LAUNCHER)}")
    how = ["--nproc_per_node", str(num_processes), "--standalone", "--max_restarts", str(max_restarts)]
    os.environ.update(importlib.import_module("gpsd_dist.commands").search_path())
    launcher = importlib.import_module("gpsd_dist.launcher")
    return launcher.main([*how, "-m", COMMANDS[name].module, *options])


def _taken(options: list[str], names: collections.abc.Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Splits `--NAME VALUE` and `--NAME=VALUE` of these names from the options of the subcommand."""
    taken, rest, words = {}, [], iter(options)
    for word in words:
        name, has_value, value = word.partition("=")
        if name in names:
            taken[name] = value if has_value else next(words, "")
        else:
            rest.append(word)
    return taken, rest


def _number(taken: dict[str, str], option: str, least: int) -> int:
    text = taken.get(option, str(least))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{option} {text or '(nothing)'}: expected a whole number, {least} or more")
    return int(text)


def _existing(file: str) -> str:
    if not os.path.isfile(file):
        raise ValueError(f"--plugin {file or '(nothing)'}: expected a Python file")
    return os.path.abspath(file)


def _mistake(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return MISTAKE
