"""Turns `--gin_file` / `--gin.X=Y` into one frozen RunConfig. The only module that imports gin."""

import argparse
import ast
import dataclasses
import importlib.util  # noqa: F401  gin 0.5.0 uses importlib.util without importing it
import pathlib
import re
import tokenize
import typing

import gin
from gin import config_parser

from gpsd_dist import config
from gpsd_dist.cli.names import Parser
from gpsd_dist.config import gin_files, option_list
from gpsd_dist.config.model import MODELS
from gpsd_dist.disk.reading import raise_if_passing
from gpsd_dist.validation import did_you_mean

MAX_FILE_BYTES = 2**20  # untuned: a config.gin takes some 5 kB
_BINDING = re.compile(r"^(?:(?P<scope>[\w/]+)/)?(?P<leaf>\w+(?:\.\w+)?) = ", re.MULTILINE)
_ASSIGNMENT = re.compile(r"^\s*(?:[\w/]+/)?\w+(?:\.\w+)?(?=\s*=)", re.MULTILINE)
_NAME = re.compile(r"(?:[\w/]+/)?\w+(?:\.\w+)?")
_REQUIRED = "gin.REQUIRED"
_USAGE = "python -m gpsd_dist.train --gin_file configs/stage/pretrain.gin --gin_file FILE ... --gin.OPTION=VALUE ..."
_LAUNCHER_HELP = """gpsd-dist train also takes
  --nproc N          run on N processes of this machine (default 1)
  --max_restarts N   start them again after a failure, from the last checkpoint, up to N times (default 0)
  --plugin FILE      a Python file that registers models of your own"""
_GIN_FILE_HELP = """repeatable, later files win; the first may include. A file is looked for as given, in the folder
configs of the working directory, and in the package"""

for _cls in config.GIN_CLASSES:
    gin.external_configurable(_cls, module="gpsd_dist")


@dataclasses.dataclass(frozen=True)
class ParsedRun:
    """Holds what the command line means."""

    run: config.RunConfig
    gin_text: str
    """Every file and override in one text that gives the same run again."""


def load_run_config(argv: list[str]) -> ParsedRun:
    """Parses `argv` and builds the whole config tree once. ValueError for what has no effect or does not fit."""
    epilog = _help_of_options(joined_values(argv)) if {"-h", "--help"} & {*argv} else None
    parser = Parser(usage=_USAGE, description=_LAUNCHER_HELP, epilog=epilog, allow_abbrev=False)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--gin_file", metavar="FILE", action="append", required=True, help=_GIN_FILE_HELP)
    args, rest = parser.parse_known_args(joined_values(argv))
    unknown = [argument for argument in rest if not (argument.startswith("--gin.") and "=" in argument)]
    if unknown:
        parser.error(f"unknown arguments {unknown}; overrides look like --gin.OUTPUT_DIR=runs/a")
    bindings = [_binding(argument.removeprefix("--gin.")) for argument in rest]
    files = [_checked_file(file, is_first=index == 0) for index, file in enumerate(args.gin_file)]
    scanned = _Scanned()
    texts = [_scan_file(file, scanned) for file in files]
    for binding in bindings:
        _scan(binding, f"override `{binding}`", scanned)
    _check_macros_are_set(scanned, bindings)

    gin.clear_config()
    try:
        for text in (*texts, "\n".join(bindings)):
            gin.parse_config(text)
        gin.finalize()
        run = gin.get_configurable("gpsd_dist.RunConfig")()
    except (ValueError, AttributeError, SyntaxError, NameError, TypeError, RuntimeError, OSError) as error:
        raise_if_passing("a gin file", error)
        raise ValueError(_explain(error, bindings, scanned)) from error
    _check_overrides(bindings, run)
    _check_files_are_read(scanned)
    return ParsedRun(run, gin.config_str())


def all_options(files: list[str] | None = None) -> list[option_list.Group]:
    """Lists every option with its defaults in both stages, for docs/options.md; or those of a run with these files."""
    required = ["--gin.DATA_DIR=(required)", "--gin.OUTPUT_DIR=(required)"]
    stages = [[f"configs/stage/{stage}.gin"] for stage in ("pretrain", "finetune")]
    given = [[f"--gin_file={file}" for file in some] for some in ([files] if files else stages)]
    runs = {run.stage: run for run in (load_run_config([*some, *required]).run for some in given)}
    macros = dict(re.findall(r"^([\w/]+\.\w+) = %(\w+)$", gin.config_str(), re.MULTILINE))
    groups = option_list.options(runs, macros)
    unread = {"pretrain": "FinetuneConfig", "finetune": "PretrainConfig"}
    return [group for group in groups if len(runs) > 1 or group.title != unread.get(*runs)]


def _help_of_options(argv: list[str]) -> str:
    files = [argument.partition("=")[2] for argument in argv if argument.startswith("--gin_file=")]
    told = (
        "Defaults are those of the files given." if files else "Defaults of both stages; with --gin_file of that one."
    )
    return f"{told}\n\n{option_list.text(all_options(files))}"


def joined_values(argv: list[str]) -> list[str]:
    """Turns `--gin.X Y` into `--gin.X=Y`, and `--gin_file F` into `--gin_file=F`."""
    joined: list[str] = []
    for argument in argv:
        if joined and re.fullmatch(r"--gin(_file|\.[\w./]+)", joined[-1]) and not argument.startswith("--"):
            joined[-1] += "=" + argument
        else:
            joined.append(argument)
    return joined


def _binding(override: str) -> str:
    """Turns `X=Y` into gin's `X = Y`; a value that is neither a Python literal nor a gin reference is quoted."""
    name, value = override.split("=", 1)
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"--gin.{override}: {name!r} is not a name like SEED, TrainConfig.epochs or dense/OptimizerConfig.peak_lr"
        )
    if not value.startswith(("%", "@")):
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval may raise
            value = repr(value)
    return f"{name} = {value}"


def _checked_file(file: str, is_first: bool) -> pathlib.Path:
    """Finds a file (`gin_files`). ValueError if it is missing, or sets a name twice."""
    path = gin_files.find(file)
    if path is None:
        known = gin_files.known()
        by_stem = {pathlib.Path(name).stem: name for name in known}
        near = did_you_mean(by_stem.get(pathlib.Path(file).stem, file), known)
        raise ValueError(f"--gin_file {file} does not exist{near}; there are {known}")
    text = _text_of(path)
    if not is_first and re.search(r"^\s*include\b", text, re.MULTILINE):
        raise ValueError(
            f"{path} has an `include`, so it must be the first --gin_file (its base would undo earlier files)"
        )
    names = [match.group().strip() for match in _ASSIGNMENT.finditer(text)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} sets {twice} twice; keep one line each")
    return path


def _text_of(path: pathlib.Path) -> str:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES:,} bytes: this is no configuration")
    return path.read_text(encoding="utf-8")


@dataclasses.dataclass
class _Scanned:
    """Collects what files and overrides say, before gin acts on it."""

    files: list[pathlib.Path] = dataclasses.field(default_factory=list)
    bindings: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    """(scope, name of a macro or Class.field, where) of what files set."""
    macros: dict[str, str] = dataclasses.field(default_factory=dict)
    """Macros that some value refers to, and where."""


class _References(config_parser.ParserDelegate):
    """Keeps what values refer to; nothing is looked up or called."""

    def __init__(self, where: str, scanned: _Scanned):
        self._where, self._scanned = where, scanned

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
        """Checks `@scope/Class` or `@scope/Class()`."""
        _check_is_ours(scoped_configurable_name.rsplit("/", 1)[-1], "", f"@{scoped_configurable_name}", self._where)
        return scoped_configurable_name

    def macro(self, macro_name: str) -> str:
        """Notes `%NAME`."""
        self._scanned.macros.setdefault(macro_name, self._where)
        return macro_name


def _check_is_ours(selector: str, option: str, shown: str, where: str) -> None:
    """Raises a ValueError for a class that is none of `config.GIN_CLASSES`, or an option that it does not have."""
    classes = {cls.__name__: cls for cls in config.GIN_CLASSES}
    name = selector.removeprefix("gpsd_dist.")
    if name not in classes:
        raise ValueError(
            f"{where}: {shown} is none of {list(classes)}{did_you_mean(name, classes)}; a configuration sets their "
            "fields, and calls nothing else"
        )
    options = [field.name for field in dataclasses.fields(classes[name])]
    if option and option not in options:
        all_of_them = did_you_mean(option, options, n=3) or f"; it has {options}"
        raise ValueError(f"{where}: {name} has no option {option!r}{all_of_them}")


def _scan_file(path: pathlib.Path, scanned: _Scanned) -> str:
    """Scans a file and what it includes; returns its text with each included one in the place of its `include`."""
    scanned.files.append(path)
    text = _text_of(path)
    lines = text.split("\n")
    for statement in _scan(text, str(path), scanned):
        if isinstance(statement, config_parser.IncludeStatement):
            included = gin_files.find(statement.filename, path)
            if included is None or included.suffix != ".gin":
                raise ValueError(f"{path} includes {statement.filename!r}, which is no .gin file that is found")
            if included in scanned.files:
                raise ValueError(f"{path} includes {statement.filename!r}, which is read already")
            lines[statement.location.line_num - 1] = _scan_file(included, scanned)
        elif isinstance(statement, config_parser.BindingStatement):
            name = f"{statement.selector}.{statement.arg_name}" if statement.arg_name else statement.selector
            scanned.bindings.append((statement.scope, name, f"{path}, line {statement.location.line_num}"))
    return "\n".join(lines)


def _scan(text: str, where: str, scanned: _Scanned) -> list[typing.Any]:
    """Splits a text into statements. ValueError for what no configuration needs, above all an import: it runs code."""
    try:
        statements = list(config_parser.ConfigParser(text, _References(where, scanned)))
    except (SyntaxError, tokenize.TokenError, RecursionError, MemoryError, IndexError) as error:
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    for statement in statements:
        if isinstance(statement, config_parser.ImportStatement):
            raise ValueError(f"{where}: `{statement.format()}` is refused: a configuration imports nothing")
        selector, option = getattr(statement, "selector", ""), getattr(statement, "arg_name", "")
        if option or isinstance(statement, config_parser.BlockDeclaration):
            _check_is_ours(selector, option, selector, where)
    if where.startswith("override") and len(statements) != 1:
        raise ValueError(f"{where}: an override sets one value, this is {len(statements)} statements")
    return statements


def _check_macros_are_set(scanned: _Scanned, bindings: list[str]) -> None:
    known = {name for _, name, _ in scanned.bindings} | {binding.split(" = ", 1)[0] for binding in bindings}
    macros = sorted(name for name in known if "." not in name)
    missing = [
        f"{where}: nothing sets %{name}{did_you_mean(name, macros)}"
        for name, where in scanned.macros.items()
        if name not in known | {_REQUIRED}
    ]
    if missing:
        raise ValueError(f"{'; '.join(missing)}; set macros are {macros}")


def _explain(error: BaseException, bindings: list[str], scanned: _Scanned) -> str:
    """Adds what to do to a message of gin: what is missing may have been given under a misspelt name."""
    text = str(error).strip()
    names = re.findall(r"(\w+)/(?:gin\.)?macro\.value set to `%gin\.REQUIRED`", text)
    if not names and "Required bindings for" in text:
        names = re.findall(r"'(\w+)'", text)
    if not names and text.startswith("RunConfig: "):
        names = re.findall(r"(?:^RunConfig:|;) (\w+) is missing", text)
    if names:
        given = [binding.split(" = ", 1)[0] for binding in bindings]
        unread = [name for name in given if "." not in name and "/" not in name and name not in scanned.macros]
        also = "".join(f"; nothing reads {name}{did_you_mean(name, sorted(scanned.macros))}" for name in unread)
        shown = " ".join(f"--gin.{name}=VALUE" for name in names)
        return f"a required option is missing ({', '.join(names)}): set it with {shown}{also}"
    return text


def _check_overrides(bindings: list[str], run: config.RunConfig) -> None:
    """Refuses an override that nothing reads, or that changes nothing that this run's model and stage compute with.

    gin silently accepts a misspelt macro or scope. One without a scope must reach a reader whose own scope does not set
    the field. Files are shared by models and stages, so what they set may go unread; so may the default.
    """
    read = {(match["scope"], match["leaf"]) for match in _BINDING.finditer(gin.operative_config_str())}
    set_in_scope = {(match["scope"], match["leaf"]) for match in _BINDING.finditer(gin.config_str()) if match["scope"]}
    unread, macros, problems = _without_effect(run), _readers_of_macros(), []
    for binding in bindings:
        match = _BINDING.match(binding)
        assert match is not None, binding
        scope, leaf = match["scope"], match["leaf"]
        readers = {entry for entry in read if entry[1] == leaf}
        if not (readers & {(scope, leaf)} if scope else readers - set_in_scope):
            known = sorted({f"{scope}/{leaf}" if scope else leaf for scope, leaf in read})
            near = did_you_mean(binding.split(" = ", 1)[0], known, n=3)
            raise ValueError(
                f"override `{binding}` changed nothing: no such macro, scope or field is read{near}; all {len(known)} "
                "are listed by gpsd-dist train --help"
            )
        fields = {leaf} if "." in leaf else macros.get(leaf, set())
        if fields and fields <= set(unread):
            problems.append(
                f"override `{binding}` has no effect: {' '.join(unread[field] for field in sorted(fields))}"
            )
    if problems:
        raise ValueError(f"{'; '.join(problems)}; leave it out, or set another ModelConfig.name or STAGE")


def _without_effect(run: config.RunConfig) -> dict[str, str]:
    """Finds each Class.field that differs from its default but is not read, and says why."""
    reads = sorted(MODELS[run.model.name].reads - {"name"})
    why = f"model {run.model.name!r} does not read it, of ModelConfig it reads {reads}"
    found = {f"ModelConfig.{name}": why for name in run.model.unread()}
    others: dict[str, typing.Any] = {"pretrain": run.finetune, "finetune": run.pretrain}
    if run.stage not in others:  # another stage may read both
        return found
    other = others[run.stage]
    default, cls = type(other)(), type(other).__name__
    changed = [f.name for f in dataclasses.fields(other) if getattr(other, f.name) != getattr(default, f.name)]
    return found | {f"{cls}.{name}": f"stage {run.stage!r} does not read {cls}" for name in changed}


def _readers_of_macros() -> dict[str, set[str]]:
    """Maps a macro to every Class.field, or other macro, whose value refers to it."""
    text = gin.config_str()
    starts = list(_BINDING.finditer(text))
    readers: dict[str, set[str]] = {}
    for match, after in zip(starts, [*starts[1:], None], strict=True):
        value = text[match.end() : after.start() if after else len(text)]
        for macro in re.findall(r"%(\w+)", value):
            readers.setdefault(macro, set()).add(match["leaf"])
    return readers


def _check_files_are_read(scanned: _Scanned) -> None:
    """Refuses what a file sets and nothing reads, since gin silently accepts a misspelt macro or scope."""
    read = {(match["scope"] or "", match["leaf"]) for match in _BINDING.finditer(gin.operative_config_str())}
    macros = sorted(name for name in scanned.macros if name != _REQUIRED)
    fields = sorted(f"{scope}/{leaf}" for scope, leaf in read if scope)
    problems = []
    for scope, name, where in scanned.bindings:
        is_macro = "." not in name
        leaf = name if is_macro else ".".join(name.split(".")[-2:])
        is_used = name in scanned.macros if is_macro else not scope or (scope, leaf) in read
        if not is_used:
            full = f"{scope}/{name}" if scope else name
            problems.append(f"{where}: nothing reads {full}{did_you_mean(full, [*macros, *fields])}")
    if problems:
        raise ValueError(f"{'; '.join(problems)}; there are the macros {macros}")
