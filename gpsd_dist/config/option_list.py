"""Lists every option of a run with its defaults and its documentation, for `--help` and for the documentation."""

import ast
import collections.abc
import dataclasses
import functools
import inspect
import itertools
import pathlib
import textwrap
import typing

from gpsd_dist.config.run import RunConfig

_WIDTH = 110


class Option(typing.NamedTuple):
    """Holds one option: the name on the command line, its field, its default in each stage, what it does."""

    name: str
    field: str
    defaults: dict[str, typing.Any]  # stage -> value
    doc: str


class Group(typing.NamedTuple):
    """Holds the options of one dataclass."""

    title: str
    doc: str
    options: list[Option]


def options(runs: collections.abc.Mapping[str, RunConfig], macros: collections.abc.Mapping[str, str]) -> list[Group]:
    """Makes a group per part of a RunConfig.

    `runs`: stage -> a run that was told nothing but what is required. `macros`: field, like "ModelConfig.width" -> the
    macro that sets it.
    """
    own = Group("RunConfig", _first_line(RunConfig), [])
    groups = [own]
    for field in dataclasses.fields(RunConfig):
        values = {stage: getattr(run, field.name) for stage, run in runs.items()}
        part = type(next(iter(values.values())))
        if not dataclasses.is_dataclass(part):
            own.options.append(_option(RunConfig, field.name, "RunConfig", values, macros))
            continue
        scope = f"{field.name}/{part.__name__}" if part.__name__ == "OptimizerConfig" else part.__name__
        made = [
            _option(part, inner.name, scope, {s: getattr(v, inner.name) for s, v in values.items()}, macros)
            for inner in dataclasses.fields(part)
        ]
        groups.append(Group(scope, _first_line(part), made))
    return groups


def _option(
    config: type,
    name: str,
    scope: str,
    defaults: dict[str, typing.Any],
    macros: collections.abc.Mapping[str, str],
) -> Option:
    field = f"{scope}.{name}"
    return Option(macros.get(field, field), field, defaults, field_docs(config).get(name, ""))


@functools.cache
def field_docs(config: type) -> dict[str, str]:
    """Reads the strings that stand below the fields of a dataclass."""
    tree = ast.parse(pathlib.Path(inspect.getfile(config)).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == config.__name__)
    return {
        field.target.id: inspect.cleandoc(doc.value.value)
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }


def _first_line(config: type) -> str:
    return (config.__doc__ or "").partition("\n")[0]


def defaults_text(option: Option) -> str:
    """Writes the default; those of both stages where they differ."""
    values = {stage: repr(value) for stage, value in option.defaults.items()}
    if len({*values.values()}) == 1:
        return next(iter(values.values())).strip("'") or "''"
    return ", ".join(f"{stage}: {value}" for stage, value in values.items())


def text(groups: list[Group]) -> str:
    """Writes all groups for a terminal."""
    lines = []
    for group in groups:
        lines += [f"{group.title}: {group.doc}", ""]
        for option in group.options:
            also = f"   [{option.field}]" if option.name != option.field else ""
            lines.append(f"  --gin.{option.name}={defaults_text(option)}{also}")
            lines += textwrap.wrap(option.doc, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines.append("")
    return "\n".join(lines)
