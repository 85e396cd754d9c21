"""Which checkpoint is the best, and which may go, on hand-made folders, on disk and in a store without rename."""

import pytest

from gpsd_dist.checkpoint import retention, storage
from tests.unit.checkpoint.folders import add, mark_best, names

HOUR_S = 3600.0


@pytest.fixture(params=["disk", "memory"])
def run(request, tmp_path):
    """A run folder."""
    if request.param == "disk":
        return tmp_path
    return storage.location(f"memory://{tmp_path.name}/run")


def _kept(run, keep_last: int, hours: float = 0.0) -> list[int]:
    folder = run / "checkpoints"
    gone = retention.removable(folder, keep_last, hours)
    return [retention.place_of(path)[0] for path in retention.complete(folder) if path not in gone]


@pytest.mark.parametrize(("best", "kept"), [(2, [2, 6, 8]), (8, [6, 8]), (None, [6, 8])])
def test_the_best_and_the_last_are_kept(run, best, kept):
    for step in (2, 4, 6, 8):
        add(run, step)
    if best is not None:
        mark_best(run, best)
    assert _kept(run, 2) == kept


@pytest.mark.parametrize(("hours", "kept"), [(0.0, [9]), (1.0, [1, 3, 6, 8, 9]), (2.5, [1, 6, 9]), (100.0, [1, 9])])
def test_one_checkpoint_per_hours_is_kept(run, hours, kept):
    for step, time_h in ((1, 0.0), (2, 0.5), (3, 1.0), (4, 1.5), (6, 3.0), (7, 3.2), (8, 5.0), (9, 5.5)):
        add(run, step, time_s=1e9 + time_h * HOUR_S)
    assert _kept(run, 1, hours) == kept


def test_what_is_kept_by_the_hour_stays_kept_while_the_run_goes_on(run):
    """Pruned after every save, as a run does: the same ones survive as if all were looked at in the end."""
    for step in range(1, 30):
        add(run, step, time_s=1e9 + step * 0.4 * HOUR_S)
        for path in retention.removable(run / "checkpoints", 2, 2.0):
            storage.delete(path, retention.STATE_NAME)
    assert [int(name[5:]) for name in names(run)] == [1, 6, 11, 16, 21, 26, 28, 29]


def test_hours_count_on_after_the_clock_was_set_back(run):
    """By a week, after the third one: not a week without a checkpoint that is kept."""
    for step in range(1, 12):
        add(run, step, time_s=1e9 + (step * 0.5 - 168 * (step > 3)) * HOUR_S)
    assert _kept(run, 1, 1.0) == [1, 3, 4, 6, 8, 10, 11]


def test_the_newest_checkpoint_knows_the_best_step(run):
    """A crash between the rename and `best.json` loses nothing."""
    add(run, 2, best_step=2)
    newest = add(run, 4, best_step=4)
    mark_best(run, 2)
    assert retention.best(run / "checkpoints") == newest
    assert _kept(run, 1) == [4]


def test_the_best_survives_a_newest_checkpoint_that_cannot_be_read(run):
    best = add(run, 2, best_step=2)
    mark_best(run, 2)
    (add(run, 4, best_step=2) / retention.STATE_NAME).write_bytes(b"{")
    assert retention.best(run / "checkpoints") == best
    assert _kept(run, 1) == [2, 4]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"step": "x"}'])
def test_a_broken_best_file_is_ignored(run, content):
    newest = add(run, 4, best_step=4)
    (run / "checkpoints" / retention.BEST_NAME).write_bytes(content)
    assert retention.best(run / "checkpoints") == newest


def test_a_step_saved_twice_counts_once_and_the_later_one(run):
    add(run, 2, best_step=2)
    add(run, 4, best_step=4)
    again = add(run, 4, best_step=4, attempt=1)
    add(run, 4, best_step=4, attempt=2, is_complete=False)
    assert retention.complete(run / "checkpoints")[-1] == again == retention.best(run / "checkpoints")
    gone = retention.removable(run / "checkpoints", 2, 0.0)
    assert [path.name for path in gone] == ["step_00000004"]


def test_unfinished_leftovers_go_but_not_what_may_be_written_now(run):
    add(run, 2, is_complete=False)
    add(run, 4)
    add(run, 6, is_complete=False)
    assert [path.name for path in retention.removable(run / "checkpoints", 1, 0.0)] == ["step_00000002"]


def test_best_file_follows_the_best(run):
    path = run / "checkpoints" / retention.BEST_NAME
    add(run, 4, best_step=4, metrics={"click/auc": 0.75})
    retention.write_best(run / "checkpoints")
    assert storage.read_json(path) == {"step": 4, "metrics": {"click/auc": 0.75}}
    storage.delete(run / "checkpoints" / "step_00000004", retention.STATE_NAME)
    retention.write_best(run / "checkpoints")
    assert not path.is_file()
