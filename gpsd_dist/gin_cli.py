"""Turns `--gin_file` / `--gin.X=Y` into one frozen RunConfig. The only module that imports gin."""

import argparse
import ast
import contextlib
import dataclasses
import importlib.util  # noqa: F401  gin 0.5.0 uses importlib.util without importing it
import pathlib
import re

import gin

from gpsd_dist import config

_REPO_ROOT = pathlib.Path(__file__).resolve().parents[1]
_BINDING = re.compile(r"^(?:(?P<scope>[\w/]+)/)?(?P<leaf>\w+(?:\.\w+)?) = ", re.MULTILINE)
_ASSIGNMENT = re.compile(r"^\s*(?:[\w/]+/)?\w+(?:\.\w+)?(?=\s*=)", re.MULTILINE)
_NAME = re.compile(r"(?:[\w/]+/)?\w+(?:\.\w+)?")
_USAGE = "python -m gpsd_dist.train --gin_file configs/stage/pretrain.gin --gin_file configs/data/grocery.gin ..."

for _cls in config.GIN_CLASSES:
    gin.external_configurable(_cls, module="gpsd_dist")


@dataclasses.dataclass(frozen=True)
class ParsedRun:
    """What the command line means."""

    run: config.RunConfig
    gin_text: str
    """Every file and override in one text that gives the same run again."""


def load_run_config(argv: list[str]) -> ParsedRun:
    """Parses `argv`, builds the whole config tree once. ValueError for what has no effect or does not fit."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, usage=_USAGE, description="Options: docstrings of gpsd_dist/config.py"
    )
    parser.add_argument(
        "--gin_file", action="append", required=True, help="repeatable, later files win; the first may include"
    )
    args, rest = parser.parse_known_args(_join_values(argv))
    unknown = [argument for argument in rest if not (argument.startswith("--gin.") and "=" in argument)]
    if unknown:
        parser.error(f"unknown arguments {unknown}; overrides look like --gin.OUTPUT_DIR=runs/a")
    bindings = [_binding(argument.removeprefix("--gin.")) for argument in rest]
    files = [_checked_file(file, is_first=index == 0) for index, file in enumerate(args.gin_file)]

    gin.clear_config()
    try:
        with contextlib.chdir(_REPO_ROOT):  # `include 'configs/...'` resolves against the working directory
            gin.parse_config_files_and_bindings([str(file) for file in files], bindings, finalize_config=True)
            run = gin.get_configurable("gpsd_dist.RunConfig")()
    except (ValueError, AttributeError, SyntaxError, NameError, TypeError, RuntimeError, OSError) as error:
        raise ValueError(_explain(error)) from error
    _check_overrides_are_read(bindings)
    return ParsedRun(run, gin.config_str())


def _join_values(argv: list[str]) -> list[str]:
    """Accepts `--gin.X Y` beside `--gin.X=Y`."""
    joined: list[str] = []
    for argument in argv:
        if joined and re.fullmatch(r"--gin\.[\w./]+", joined[-1]) and not argument.startswith("--"):
            joined[-1] += "=" + argument
        else:
            joined.append(argument)
    return joined


def _binding(override: str) -> str:
    """`X=Y` -> gin's `X = Y`; a value that is neither a Python literal nor a gin reference is quoted."""
    name, value = override.split("=", 1)
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"--gin.{override}: {name!r} is not a name like SEED, TrainConfig.epochs or dense/OptimizerConfig.peak_lr"
        )
    if not value.startswith(("%", "@")):
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = repr(value)
    return f"{name} = {value}"


def _checked_file(file: str, is_first: bool) -> pathlib.Path:
    """An existing file: as given, or relative to the repository."""
    path = pathlib.Path(file).resolve()
    if not path.is_file():
        path = _REPO_ROOT / file
    if not path.is_file():
        folder = _REPO_ROOT / "configs"
        known = sorted(str(p.relative_to(_REPO_ROOT)) for p in folder.rglob("*.gin"))
        raise ValueError(f"--gin_file {file} does not exist; there are {known}")
    text = path.read_text()
    if not is_first and re.search(r"^\s*include\b", text, re.MULTILINE):
        raise ValueError(
            f"{path} has an `include`, so it must be the first --gin_file (its base would undo earlier files)"
        )
    names = [match.group().strip() for match in _ASSIGNMENT.finditer(text)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} sets {twice} twice; keep one line each")
    return path


def _explain(error: BaseException) -> str:
    """Messages of gin, with what to do."""
    text = str(error).strip()
    names = re.findall(r"(\w+)/(?:gin\.)?macro\.value set to `%gin\.REQUIRED`", text)
    if not names and re.search(r"missing \d+ required .*argument|Required bindings for", text):
        names = re.findall(r"'(\w+)'", text)
    if names:
        return f"a required option is missing ({', '.join(names)}): set it with --gin.NAME=VALUE. gin says: {text}"
    return text


def _check_overrides_are_read(bindings: list[str]) -> None:
    """A misspelt macro or scope is silently accepted by gin: every override must show up in what was read.

    One without a scope must reach a reader whose own scope does not set the field.
    """
    read = {(match["scope"], match["leaf"]) for match in _BINDING.finditer(gin.operative_config_str())}
    set_in_scope = {(match["scope"], match["leaf"]) for match in _BINDING.finditer(gin.config_str()) if match["scope"]}
    for binding in bindings:
        match = _BINDING.match(binding)
        assert match is not None, binding
        readers = {entry for entry in read if entry[1] == match["leaf"]}
        reached = readers & {(match["scope"], match["leaf"])} if match["scope"] else readers - set_in_scope
        if not reached:
            known = sorted({f"{scope}/{leaf}" if scope else leaf for scope, leaf in read})
            raise ValueError(
                f"override `{binding}` changed nothing: no such macro, scope or field is read; there are {known}"
            )
