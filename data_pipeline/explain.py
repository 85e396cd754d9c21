"""Turns a pydantic ValidationError into this project's messages: what was given, what is expected, all at once."""

import difflib
import typing

import pydantic

STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
"""Configuration of every checked dataclass: no value is converted to another type, no unknown key is dropped."""

_KINDS = {"string": "str", "int": "int", "float": "float", "bool": "bool", "tuple": "a list", "dataclass": "a table"}


class Problem(typing.NamedTuple):
    """Describes one value that does not fit its field."""

    path: tuple[str | int, ...]
    """Names and list places that lead to the field."""
    given: typing.Any
    expected: str
    """In words, such as "at least 1"; empty where the key itself is the mistake."""
    is_unknown: bool = False
    is_missing: bool = False

    @property
    def key(self) -> str:
        """Writes the path as a user does, such as `history.feature[0].kind`."""
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return text.removeprefix(".")


def problems(error: pydantic.ValidationError) -> list[Problem]:
    """Lists every value that pydantic refused, in the order of the fields."""
    found = []
    for entry in error.errors(include_url=False):
        kind = entry["type"]
        is_unknown, is_missing = kind in ("unexpected_keyword_argument", "extra_forbidden"), kind.startswith("missing")
        words = "" if is_unknown or is_missing else _expected(kind, entry.get("ctx", {}), entry["msg"])
        found.append(Problem(entry["loc"], entry["input"], words, is_unknown, is_missing))
    return found


def _expected(kind: str, context: dict, message: str) -> str:
    if kind == "literal_error":
        return f"one of {context['expected']}"
    if kind == "value_error":  # raised by a validator of ours, whose text says what is expected
        return str(context["error"])
    for name, words in (("ge", "at least"), ("le", "at most"), ("gt", "more than"), ("lt", "less than")):
        if name in context:
            return f"{words} {context[name]}"
    return _KINDS.get(kind.removesuffix("_type"), message.removeprefix("Input should be "))


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """Names the known key nearest to a misspelt one, or lists all of them where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
