"""kill -9 at any file operation of a save leaves the old or the new checkpoint, whole, and the best one with it."""

import json

import pytest

from tests.helpers import forked
from tests.integration.crash_points import NEXT, SCENARIOS

pytestmark = pytest.mark.timeout(600)
TIMEOUT_S = 500


@pytest.mark.parametrize(
    ("scenario", "store"),
    [
        ("same_step_again", "disk"),
        ("new_best", "bucket"),
        *(
            pytest.param(scenario, store, marks=pytest.mark.slow)
            for scenario in SCENARIOS
            for store in ("disk", "bucket")
            if (scenario, store) not in (("same_step_again", "disk"), ("new_best", "bucket"))
        ),
    ],
)
def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_state(tmp_path, scenario, store):
    result = forked.run("tests.integration.crash_points", tmp_path / "r", scenario, store, timeout_s=TIMEOUT_S)
    assert result.returncode == 0, result.stderr
    points = json.loads(result.stdout)
    before, (step, best_step, value) = SCENARIOS[scenario].before, SCENARIOS[scenario].saved
    values = {saved_step: saved_value for saved_step, _, saved_value in before}
    old = (before[-1][2], values[before[-1][1]]) if before else (None, None)
    new = (value, (values | {step: value})[best_step])
    states = [(point["after_crash"]["latest"], point["after_crash"]["best"]) for point in points]
    for point, state in zip(points, states, strict=True):
        assert state in (old, new), point
        assert point["after_crash"]["named"] in (None, *point["after_crash"]["steps"]), point
        after = point["after_next"]  # the next save of the run is not disturbed by what is lying about
        assert point["next_status"] == 0 and (after["latest"], after["best"], after["named"]) == (8.0, 8.0, NEXT[0])
        assert not [name for name in after["names"] if "partial" in name or "tmp" in name], point
    assert states == sorted(states, key=lambda state: state == new)  # once the new one is there, it stays
    assert {old, new} == set(states) and states[-1] == new
    assert [point["status"] for point in points] == [-9] * (len(points) - 1) + [0]
    operations = [point["operation"].split(" ")[0] for point in points]
    assert {"open", "write", *(("fsync", "os.rename") if store == "disk" else ())} <= set(operations)
    assert len(points) > 12, operations
