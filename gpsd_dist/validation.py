"""Checks that options classes and files read from outside need. Neither gin nor torch is imported here."""

import dataclasses
import math
import reprlib
import types
import typing


class UnknownOptions(ValueError):
    """A saved run has options that this version does not have. Its message says of which version they are."""


def unknown(config: type, raw: typing.Mapping[str, typing.Any]) -> list[str]:
    """Names in `raw` that are no fields of the dataclass."""
    return sorted(set(raw) - {field.name for field in dataclasses.fields(config)})


def check_known(config: type, raw: dict[str, typing.Any], gone: dict[str, str]) -> None:
    """`raw`: a saved `config`, whose fields may be dataclasses. `gone`: "Class.option" -> what became of it.

    UnknownOptions names the options that `config` does not have.
    """
    hints = typing.get_type_hints(config)
    names = [f"{config.__name__}.{name}" for name in unknown(config, raw)]
    for part, value in raw.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(kind := hints.get(part)):
            assert isinstance(kind, type)
            names += [f"{kind.__name__}.{name}" for name in unknown(kind, value)]
    younger = ", ".join(reprlib.repr(name)[1:-1] for name in names if name not in gone)
    if younger:
        raise UnknownOptions(f"written by a newer version (unknown option {younger})")
    if names:
        known = "; ".join(f"{name}: {gone[name]}" for name in names)
        raise UnknownOptions(f"written by an older version, with options that are gone ({known})")


def below(config: typing.Any, name: str, minimum: float) -> list[str]:
    """What is wrong with a number that is smaller than `minimum`; nothing otherwise."""
    value = getattr(config, name)
    return [f"{name} {value} must be >= {minimum}"] if isinstance(value, int | float) and value < minimum else []


def check_types(config: typing.Any, *, is_finite: bool = True) -> None:
    """Gin checks no types: `layers = 4.5` or `dropout = "0.1"` would get through. `is_finite`: nor may NaN."""
    hints = typing.get_type_hints(type(config))
    problems = []
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if isinstance(value, list) and typing.get_origin(hint) is tuple:  # gin has no tuples in older files
            value = tuple(value)
            object.__setattr__(config, field.name, value)
        if not _is_instance(value, hint):
            problems.append(f"{field.name} is {reprlib.repr(value)}, expected {getattr(hint, '__name__', hint)}")
        elif is_finite and not all(map(_is_finite, value.values() if isinstance(value, dict) else (value,))):
            problems.append(f"{field.name} is {reprlib.repr(value)}, expected finite numbers")
    raise_all(config, problems)


def _is_finite(value: typing.Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def nests_deeper(value: typing.Any, levels: int) -> bool:
    """Whether lists, tuples and dicts in `value` (a tree) stand in each other more than `levels` deep."""
    layer = [value]
    for _ in range(levels):
        containers = [entry for entry in layer if isinstance(entry, dict | list | tuple)]
        layer = [part for entry in containers for part in (entry.values() if isinstance(entry, dict) else entry)]
    return any(isinstance(entry, dict | list | tuple) for entry in layer)


def _is_instance(value: typing.Any, hint: typing.Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return True
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_instance(entry, arguments[0]) for entry in value)
    if origin is dict:
        entries = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_is_instance(k, arguments[0]) and _is_instance(v, arguments[1]) for k, v in entries)
    if origin is types.UnionType:
        return any(_is_instance(value, argument) for argument in arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def raise_all(config: typing.Any, problems: list[str]) -> None:
    """All problems of one dataclass at once."""
    if problems:
        raise ValueError(f"{type(config).__name__}: " + "; ".join(problems))
