"""Changing the version: a good one is swapped in, a bad one stays out, the one before is still there."""

import contextlib
import os
import threading
import time

import pytest

from gpsd_dist.serving.artefact import ArtefactError, open_version
from gpsd_dist.serving.reload import Versions
from tests.helpers.fake_scorer import FakeScorer, make_current, write_version


@pytest.fixture
def served(tmp_path):
    """Root, `Versions` over two versions with v1 current, and the outcomes it told."""
    write_version(tmp_path, "v2")
    write_version(tmp_path, "v1")
    told: list[tuple[str, str]] = []
    loads: list[str] = []

    def load(root):
        scorer = FakeScorer(root)
        loads.append(scorer.version)
        return scorer

    versions = Versions(
        tmp_path, load, lambda outcome, scorer: told.append((outcome, scorer.version)), contextlib.nullcontext()
    )
    return tmp_path, versions, told, loads


def test_a_new_version_is_loaded_once_and_a_rollback_not_at_all(served):
    root, versions, told, loads = served
    first = versions.scorer()
    versions.poll()
    assert versions.scorer() is first and told == []
    make_current(root, "v2")
    versions.poll()
    versions.poll()
    assert versions.scorer().version == "v2" and told == [("loaded", "v2")]
    make_current(root, "v1")
    versions.poll()
    assert versions.scorer() is first and told[1:] == [("rolled back", "v1")]
    assert loads == ["v1", "v2"]


def test_only_the_version_before_is_kept(served):
    root, versions, _, loads = served
    for version in ("v2", "v3", "v1"):
        write_version(root, version)
        versions.poll()
    assert versions.scorer().version == "v1" and loads == ["v1", "v2", "v3", "v1"]


@pytest.mark.parametrize("fault", ["corrupt", "no such version", "no json", "gone"])
def test_a_version_that_fails_stays_out_and_is_tried_once(served, fault, caplog):
    root, versions, told, _ = served
    if fault == "corrupt":
        write_version(root, "v2", is_corrupt=True)
    elif fault == "no such version":
        make_current(root, "v9")
    elif fault == "no json":
        (root / "current.json").write_bytes(b"\xff{")
    else:
        (root / "current.json").unlink()
    for _ in range(3):
        versions.poll()
    assert versions.scorer().version == "v1"
    assert told == ([] if fault == "gone" else [("failed", "v1")])
    assert len(caplog.records) == 1 and "v1 goes on" in caplog.text
    write_version(root, "v3")
    versions.poll()
    assert versions.scorer().version == "v3"


def test_a_first_version_that_fails_is_an_error(tmp_path):
    write_version(tmp_path, "v1", is_corrupt=True)
    with pytest.raises(ValueError, match="v1 is damaged"):
        Versions(tmp_path, FakeScorer, lambda outcome, scorer: None, contextlib.nullcontext())


def test_the_watching_thread_changes_the_version_inside_the_lock_and_ends(served):
    root, versions, _, _ = served
    entered = []

    @contextlib.contextmanager
    def lock():
        entered.append(threading.current_thread().name)
        yield

    versions._one_at_a_time = lock()
    stopped = threading.Event()
    thread = versions.watch(stopped, 0.01)
    make_current(root, "v2")
    until_s = time.monotonic() + 30
    while versions.scorer().version != "v2" and time.monotonic() < until_s:
        time.sleep(0.01)
    stopped.set()
    thread.join(timeout=30)
    assert versions.scorer().version == "v2" and entered == ["reload"] and not thread.is_alive()


def test_a_pipe_or_an_endless_file_in_place_of_the_pointer_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "current.json")
    with pytest.raises(ArtefactError, match=r"current\.json is a pipe"):
        Versions(tmp_path, open_version, lambda outcome, scorer: None, contextlib.nullcontext())
    (tmp_path / "current.json").unlink()
    (tmp_path / "current.json").symlink_to("/dev/zero")
    with pytest.raises(ArtefactError, match=r"current\.json cannot be read"):
        Versions(tmp_path, open_version, lambda outcome, scorer: None, contextlib.nullcontext())
