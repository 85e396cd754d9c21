"""The table of signal sizes: what it measures of a model that trains, on a tiny log."""

from tests.helpers import forked
from tests.helpers.synthetic import write_dataset


def test_a_vanishing_signal_shows_and_the_default_has_none(tmp_path):
    """In a process of its own, because a run sets up logging for its whole process; forked, to import nothing anew."""
    write_dataset(tmp_path, seed=0, num_rows=200)
    result = forked.run("benchmarks.signals", "--data_dir", tmp_path, "--models", "din", "--steps", 3)
    assert result.returncode == 0, result.stderr
    rows = {}
    for line in result.stdout.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if line.startswith("| `"):
            rows[cells[1].strip("`")] = [float(cell) if cell else None for cell in cells[2:-1]]
    official_out, _, official_change, out, gradient, _ = rows["heads.mlps.click.4.weight"]
    assert official_out < 1e-3 < 1e-2 < out
    assert gradient > 0 and official_change > 0
    official_gradient, gradient = rows["backbone.tower.attention.linears.0.weight"][1::3]
    assert gradient > 10 * official_gradient
