"""The table of signal sizes: what it measures of a model that trains, on a tiny log."""

import pytest

from benchmarks import signals
from tests.helpers.synthetic import write_dataset


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, seed=0, num_rows=200)
    return folder


def test_a_vanishing_signal_shows_and_the_default_has_none(data_dir, capsys):
    assert signals.main(["--data_dir", str(data_dir), "--models", "din", "--steps", "3"]) == 0
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if line.startswith("| `"):
            rows[cells[1].strip("`")] = [float(cell) if cell else None for cell in cells[2:-1]]
    official_out, _, official_change, out, gradient, change = rows["heads.mlps.click.4.weight"]
    assert official_out < 1e-3 < 1e-2 < out
    assert gradient > 0 and change > 0 and official_change > 0
    official_gradient, gradient = rows["backbone.tower.attention.linears.0.weight"][1::3]
    assert gradient > 10 * official_gradient
