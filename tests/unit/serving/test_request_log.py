"""The request log: a sample as Parquet, user ids hashed, old files gone, a user deleted, a full disk survived."""

import concurrent.futures
import os
import stat
import time

import pyarrow.parquet as pq
import pytest

from gpsd_dist.serving import request_log
from gpsd_dist.serving.answer import Answer
from gpsd_dist.serving.request_log import RequestLog, forget, main
from tests.helpers.fake_scorer import FakeReader

USERS = ("anna", "bert", "anna", None)


def request(user: str | None) -> dict:
    return {"user_id": user, "request_time_s": 5, "history.item": ["a"], "candidate.item": ["b", "cc"]}


ANSWER = Answer("v1", {"click": {"logit": [0.5, -1.0], "probability": [0.62, 0.27]}}, 3, 1, 60)


def written(folder, *, sample: float = 1.0, hash_users: bool = True, keep_days: float = 7.0, lost=None):
    """Logs one request per user, and returns the rows of all files."""
    on_error = (lost if lost is not None else []).append
    log = RequestLog(folder, sample, keep_days, hash_users, FakeReader().from_json, on_error)
    log.add([request(user) for user in USERS], [ANSWER] * len(USERS))
    log.close()
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_requests_and_scores_are_written_with_hashed_users(tmp_path):
    rows = written(tmp_path / "log")
    assert len(rows) == 4
    assert rows[0]["user_id"] == rows[2]["user_id"] != rows[1]["user_id"] and rows[3]["user_id"] is None
    assert not {"anna", "bert"} & {row["user_id"] for row in rows}
    assert rows[0]["candidate.item"] == ["b", "cc"] and rows[0]["score.click"] == [0.5, -1.0]
    assert (rows[0]["version"], rows[0]["unknown_ids"], rows[0]["dropped_events"]) == ("v1", 3, 1)
    assert rows[0]["counters_age_s"] == 60
    assert abs(rows[0]["logged_s"] - time.time()) < 60
    assert stat.S_IMODE((tmp_path / "log" / "user_id.key").stat().st_mode) == 0o600
    other = written(tmp_path / "other")
    assert other[0]["user_id"] != rows[0]["user_id"]  # a key of its own


def test_users_stay_as_they_are_if_asked(tmp_path):
    assert [row["user_id"] for row in written(tmp_path, hash_users=False)] == list(USERS)


def test_sample_is_a_share(tmp_path):
    assert written(tmp_path, sample=0.0) == []
    log = RequestLog(tmp_path, 0.25, 7.0, True, FakeReader().from_json, lambda lost: None)
    log._random.seed(1)
    for _ in range(50):
        log.add([request("u")] * 20, [ANSWER] * 20)
    log.close()
    count = sum(pq.read_metadata(path).num_rows for path in tmp_path.glob("*.parquet"))
    assert 190 < count < 310  # 250 expected, standard deviation 14


def test_old_files_are_deleted(tmp_path):
    written(tmp_path)
    (old,) = tmp_path.glob("*.parquet")
    os.utime(old, (time.time() - 8 * 86_400,) * 2)
    assert len(written(tmp_path)) == 4 and not old.exists()


@pytest.mark.parametrize("hash_users", [True, False])
def test_a_user_is_deleted(tmp_path, hash_users, capsys):
    written(tmp_path, hash_users=hash_users)
    written(tmp_path, hash_users=hash_users)
    assert main([str(tmp_path), "--forget", "anna"]) == 0
    assert "deleted 4 logged requests" in capsys.readouterr().out
    users = [row["user_id"] for path in tmp_path.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert len(users) == 4 and users.count(None) == 2
    assert forget(tmp_path, "anna") == 0
    assert main([str(tmp_path / "absent"), "--forget", "anna"]) == 2
    (tmp_path / "other").mkdir()
    assert main([str(tmp_path / "other"), "--forget", "anna"]) == 2 and not any((tmp_path / "other").iterdir())


@pytest.mark.parametrize("hash_users", [True, False])
def test_what_a_server_still_holds_of_a_forgotten_user_is_never_written(tmp_path, hash_users, monkeypatch):
    log = RequestLog(tmp_path, 1.0, 7.0, hash_users, FakeReader().from_json, lambda lost: None)
    log.add([request(user) for user in (*USERS, " anna ")], [ANSWER] * 5)
    assert forget(tmp_path, "anna") == 0
    later_s = time.time() + 2
    monkeypatch.setattr(request_log.time, "time", lambda: later_s)
    log.add([request("anna")], [ANSWER])  # came back
    (tmp_path / "of_a_writer_that_died.tmp").write_text("anna")
    log.close()
    (path,) = tmp_path.glob("*.parquet")
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == 3 and rows[2]["logged_s"] == int(later_s) and rows[1]["user_id"] is None
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".user*"))


def test_forgetting_leaves_a_file_its_age(tmp_path):
    written(tmp_path)
    (path,) = tmp_path.glob("*.parquet")
    os.utime(path, (time.time() - 6 * 86_400,) * 2)
    before = path.stat().st_mtime_ns
    assert forget(tmp_path, "anna") == 2 and path.stat().st_mtime_ns == before


def test_workers_that_start_together_have_one_key(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(request_log.read_key, [tmp_path] * 8))
    assert len(keys) == 1 and len(keys.pop()) == 32


def test_what_cannot_be_written_is_counted(tmp_path, monkeypatch):
    lost: list[int] = []

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(request_log.pq, "write_table", full)
    assert written(tmp_path, lost=lost) == [] and lost == [4]


def test_a_disk_that_does_not_keep_up_loses_requests_and_not_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "_MAX_BUFFERED", 3)
    lost: list[int] = []
    assert len(written(tmp_path, lost=lost)) == 3 and lost == [1]
