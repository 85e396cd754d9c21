"""How properties are run: a bounded, repeatable number of examples by default, many more with `-m slow`."""

import collections.abc
import contextlib
import resource
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

THOROUGH = 25
"""Times as many examples with `-m slow`."""
MAX_GROWTH_BYTES = 2**30
"""More than any example needs, far less than what the files of some examples claim."""


def fuzz(
    examples: int, **strategies: SearchStrategy[typing.Any]
) -> collections.abc.Callable[[collections.abc.Callable[..., None]], collections.abc.Callable[..., None]]:
    """Makes a test of a property: with `examples` examples, and with many more, marked slow."""
    many = pytest.param(examples * THOROUGH, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    def decorate(check: collections.abc.Callable[..., None]) -> collections.abc.Callable[..., None]:
        @pytest.mark.parametrize("examples", [examples, many])
        def run(examples: int) -> None:
            bounded = settings(
                max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=health
            )
            bounded(given(**strategies)(check))()

        run.__name__, run.__doc__ = check.__name__, check.__doc__
        return run

    return decorate


@contextlib.contextmanager
def clean_or_one_error() -> collections.abc.Iterator[list[Exception]]:
    """Nothing but ValueError or OSError comes out, with a message; memory stays bounded. Yields the error, if any."""
    before = _peak_bytes()
    errors: list[Exception] = []
    try:
        yield errors
    except (ValueError, OSError) as error:
        assert str(error).strip(), repr(error)
        errors.append(error)
    assert _peak_bytes() - before < MAX_GROWTH_BYTES


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def assert_one_error_line(status: int, stderr: str) -> None:
    """What a command does with bad input."""
    assert status == 2, (status, stderr)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
