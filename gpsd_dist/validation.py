"""Makes dataclasses that pydantic checks, and words what is wrong for a user. Imports neither gin nor torch."""

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import math
import reprlib
import typing

import pydantic

AtLeast0 = typing.Annotated[int, pydantic.Field(ge=0)]
AtLeast1 = typing.Annotated[int, pydantic.Field(ge=1)]
NotNegative = typing.Annotated[float, pydantic.Field(ge=0)]
Names = typing.Annotated[  # JSON has no tuples, and older gin files have lists too
    tuple[str, ...], pydantic.BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]
AUTO: typing.Any = "auto"
"""Stands in an option until `config.from_data.resolve` puts a number in its place, before anything computes with it."""
OrAuto = pydantic.WrapValidator(lambda value, check: value if value == AUTO else check(value))
MAY_CHANGE = {"may_change_on_resume": True}
"""Metadata of an option that a resumed run may set anew, because no trained number depends on it."""
_SIGNS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
_ABOUT_A_VALUE = {*_SIGNS, "value_error"}
_T = typing.TypeVar("_T")
_Rules = tuple[collections.abc.Callable[[typing.Any], collections.abc.Iterable[str]], ...]


class UnknownOptions(ValueError):
    """A saved run has options that this version does not have. Its message says of which version they are."""


def did_you_mean(word: str, known: collections.abc.Iterable[str], n: int = 1) -> str:
    """Suggests up to `n` known words spelt like `word`, whatever the case: `; did you mean 'x'?`, or nothing."""
    written = {name.lower(): name for name in known}
    near = [written[name] for name in difflib.get_close_matches(word.lower(), list(written), n=n)]
    also = f" (or {', '.join(near[1:])})" if near[1:] else ""
    return f"; did you mean {near[0]!r}?{also}" if near else ""


def one_of(choices: tuple[str, ...], **gone: str) -> pydantic.AfterValidator:
    """Restricts a text to `choices`. `gone`: choices of earlier versions, and what to say of each."""

    def check(value: str) -> str:
        if value in gone:
            raise ValueError(f"{value!r} {gone[value]}")
        if value not in choices:
            raise ValueError(f"{value!r} is not one of {choices}{did_you_mean(value, choices)}")
        return value

    return pydantic.AfterValidator(check)


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def checked(
    *, rules: _Rules = (), frozen: bool = True, is_finite: bool = True
) -> collections.abc.Callable[[type[_T]], type[_T]]:
    """Makes a class a strict pydantic dataclass whose problems come in one ValueError, `Class: problem; problem`.

    `rules` get the instance and yield what is wrong between its fields; they are asked where all types are right.
    An int passes as a float, but no bool as a number. `is_finite`: nor does NaN or an infinity.
    """

    def decorate(cls: type[_T]) -> type[_T]:
        strict = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=not is_finite)
        made: typing.Any = pydantic.dataclasses.dataclass(frozen=frozen, config=strict)(cls)
        validate = made.__init__

        @functools.wraps(validate)
        def init(self: typing.Any, *args: typing.Any, **kwargs: typing.Any) -> None:
            errors = []
            try:
                validate(self, *args, **kwargs)
            except pydantic.ValidationError as error:
                errors = error.errors(include_url=False)
                fields = dataclasses.fields(self)
                given = dict(zip((field.name for field in fields), args, strict=False)) | kwargs
                made_now = {f.name: f.default_factory() for f in fields if callable(f.default_factory)}
                self.__dict__.update(made_now | given)  # for the rules: this instance reaches nobody else
            problems = [_problem(made, self.__dict__, error) for error in errors]
            if all(error["type"] in _ABOUT_A_VALUE for error in errors):
                problems += [problem for rule in rules for problem in rule(self)]
            if problems:
                raise ValueError(f"{made.__name__}: {'; '.join(dict.fromkeys(problems))}")

        # Gin reads names and defaults of options here, to tell what a configuration may set.
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        init.__signature__ = inspect.Signature([itself, *inspect.signature(made).parameters.values()])  # type: ignore[attr-defined]
        made.__init__ = init
        return typing.cast("type[_T]", made)

    return decorate


def _problem(config: type, given: dict[str, typing.Any], error: typing.Any) -> str:
    """Words one of pydantic's errors: the option, what was given, what is expected."""
    name, *inner = error["loc"]
    if isinstance(name, int):  # an argument that was given by its place
        name = dataclasses.fields(config)[name].name  # type: ignore[arg-type]
    where = str(name) + "".join(f"[{key!r}]" for key in inner)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{name} is missing"
    if kind.startswith("unexpected"):
        return f"{name} is no option{did_you_mean(str(name), (f.name for f in dataclasses.fields(config)))}"  # type: ignore[arg-type]
    if kind == "value_error":
        return f"{where} {context['error']}"
    if kind in _SIGNS:
        (limit,) = context.values()
        return f"{where} {reprlib.repr(error['input'])} must be {_SIGNS[kind]} {limit:g}"
    hint = typing.get_type_hints(config)[name]
    expected = "finite numbers" if kind == "finite_number" else getattr(hint, "__name__", str(hint))
    extras = getattr(typing.get_type_hints(config, include_extras=True)[name], "__metadata__", ())
    expected += f" or {AUTO!r}" if OrAuto in extras else ""
    return f"{name} is {reprlib.repr(given[name])}, expected {expected}"


def flattened(nested: collections.abc.Mapping[str, typing.Any], prefix: str = "") -> dict[str, typing.Any]:
    """Flattens nested options to dotted names. Lists stay values, and so do empty objects."""
    found: dict[str, typing.Any] = {}
    for name, value in nested.items():
        is_group = isinstance(value, dict) and bool(value)
        found |= flattened(value, f"{prefix}{name}.") if is_group else {prefix + name: value}
    return found


def json_safe(value: typing.Any) -> typing.Any:
    """Replaces NaN and infinities by None, which JSON cannot express otherwise, inside dicts and lists."""
    if isinstance(value, dict):
        return {key: json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def unknown(config: type, raw: collections.abc.Mapping[str, typing.Any]) -> list[str]:
    """Lists the names in `raw` that are no fields of the dataclass."""
    return sorted(set(raw) - {field.name for field in dataclasses.fields(config)})  # type: ignore[arg-type]


def check_known(config: type, raw: dict[str, typing.Any], gone: dict[str, str]) -> None:
    """Refuses a saved `config`, whose fields may be dataclasses, for options that this version does not have.

    `gone`: "Class.option" -> what became of it. UnknownOptions says of which version the others are.
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
