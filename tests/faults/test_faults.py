"""Every fault of `cases` as a test. `make faults` runs the same with a summary."""

import pytest

from tests.faults.cases import CASES, QUICK
from tests.faults.jobs import Workshop


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("faults"))


@pytest.mark.timeout(3600)  # each job in it has a limit of its own
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_run_survives(workshop, name, monkeypatch):
    if name in QUICK:
        monkeypatch.setattr(workshop, "launcher", "tests.faults.forking_launcher")
    assert CASES[name](workshop) >= 0  # steps lost; how many may be is up to the case
