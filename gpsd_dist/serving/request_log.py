"""Keeps a sample of what was asked and answered, as Parquet: raw columns, version, age of counters, counts, scores.

`python -m gpsd_dist.predict --requests DIR` scores the files again. User ids are hashed with a key that stays in the
folder, unless told otherwise; files older than the limit are deleted. A user is deleted by

    python -m gpsd_dist.serving.request_log DIR --forget USER

which also tells the servers that log to this folder: what they keep in memory of that user is never written.
"""

import sys

if not __package__:
    sys.exit("error: start it as a module, in the root of the repository: python -m gpsd_dist.serving.request_log ...")

import argparse
import collections.abc
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import random
import secrets
import threading
import time
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpsd_dist.cli.main import run_main
from gpsd_dist.cli.names import Parser
from gpsd_dist.disk.text import say_error
from gpsd_dist.disk.writing import check_place, replacing, write

log = logging.getLogger(__name__)
ADDED = ("logged_s", "version", "unknown_ids", "dropped_events")
"""Columns of a logged request beside those that came."""
COUNTERS_AGE = "counters_age_s"
"""One more; null where the model counts nothing, and not there in files of before."""
SCORE_PREFIX = "score."
"""Begins the names of the columns of logits, one list per request."""
USER, _KEY_NAME = "user_id", "user_id.key"
_FORGOTTEN_NAME = "forgotten.json"
_DAY_S = 86_400
_FLUSH_REQUESTS = 1000  # requests in a file at most; untuned
_FLUSH_S = 60
_FORGOTTEN_KEPT_S = 60 * _FLUSH_S  # far longer than a request waits to be written
_MAX_BUFFERED = 10 * _FLUSH_REQUESTS  # beyond this, requests are dropped and counted: the disk does not keep up


_Row: typing.TypeAlias = tuple[dict[str, typing.Any], typing.Any, int]
"""Request, its answer, epoch second in which it was answered."""


def hashed_user(user_id: str, key: bytes) -> str:
    """Returns a keyed hash of a user id, whatever blanks are around it."""
    return hashlib.blake2b(user_id.strip().encode(), key=key, digest_size=16).hexdigest()


def read_key(folder: pathlib.Path) -> bytes:
    """Reads the key of the folder, made on first use; only its owner can read it."""
    path, aside = folder / _KEY_NAME, folder / f".{_KEY_NAME}-{secrets.token_hex(8)}"
    if not path.exists():  # whole or not there: several workers start at once
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_bytes(32).hex())
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()
    check_place(path)
    return bytes.fromhex(path.read_text())


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> collections.abc.Iterator[dict[str, int]]:
    """Excludes all others who write into the folder; gives hashed user -> epoch second in which it was forgotten.

    Unfinished files are of writers that died, and are deleted.
    """
    with open(folder / _KEY_NAME, encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for aside in folder.glob("*.tmp"):
            aside.unlink(missing_ok=True)
        forgotten = folder / _FORGOTTEN_NAME
        yield json.loads(forgotten.read_text()) if forgotten.exists() else {}


class RequestLog:
    """Samples requests and writes them in a thread of its own; scoring never waits for the disk."""

    def __init__(
        self,
        folder: pathlib.Path,
        sample: float,
        keep_days: float,
        hash_users: bool,
        to_table: typing.Callable[[list[dict[str, typing.Any]]], pa.Table],
        on_error: typing.Callable[[int], None],
    ) -> None:
        """`to_table` is `RequestReader.from_json`; `on_error` hears how many requests were lost.

        OSError if the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.sample, self.keep_days, self.on_error = folder, sample, keep_days, on_error
        self._to_table = to_table
        self._key, self._hash_users = read_key(folder), hash_users
        self._random = random.Random()
        self._rows: list[_Row] = []
        self._wake, self._is_closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    def add(self, requests: list[dict[str, typing.Any]], answers: list[typing.Any]) -> None:
        """Keeps a sample of a batch."""
        now_s = int(time.time())
        rows = [
            (request, answer, now_s)
            for request, answer in zip(requests, answers, strict=True)
            if self._random.random() < self.sample
        ]
        with self._wake:
            free = max(0, _MAX_BUFFERED - len(self._rows))
            self._rows += rows[:free]
            if len(self._rows) >= _FLUSH_REQUESTS:
                self._wake.notify()
        if len(rows) > free:
            self.on_error(len(rows) - free)

    def close(self) -> None:
        """Writes what is left."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        is_closed = False
        while not is_closed:
            with self._wake:
                self._wake.wait_for(lambda: self._is_closed or len(self._rows) >= _FLUSH_REQUESTS, timeout=_FLUSH_S)
                rows, self._rows, is_closed = self._rows, [], self._is_closed
            try:
                with _locked(self.folder) as forgotten:
                    self._write(rows, forgotten)
                    self._delete_old()
            except Exception as error:  # a full disk, a folder that is gone: scoring goes on
                log.error("%d logged requests are lost: %s", len(rows), error)
                self.on_error(len(rows))

    def _write(self, rows: list[_Row], forgotten: dict[str, int]) -> None:
        if not rows:
            return
        requests, answers, times_s = zip(*rows)
        table, is_kept = self._to_table(list(requests)), np.ones(len(rows), bool)
        if USER in table.column_names:
            users = [None if user is None else hashed_user(str(user), self._key) for user in table[USER].to_pylist()]
            is_kept = np.array([s > forgotten.get(user, -1) for user, s in zip(users, times_s, strict=True)])
            if self._hash_users:
                table = table.set_column(table.column_names.index(USER), USER, pa.array(users, pa.string()))
        added = {"logged_s": pa.array(times_s, pa.int64()), "version": pa.array([a.version for a in answers])}
        added["unknown_ids"] = pa.array([answer.unknown_ids for answer in answers], pa.int64())
        added["dropped_events"] = pa.array([answer.dropped_events for answer in answers], pa.int64())
        added[COUNTERS_AGE] = pa.array([answer.counters_age_s for answer in answers], pa.int64())
        for task in answers[0].tasks:
            scores = [answer.tasks.get(task, {}).get("logit") for answer in answers]
            added[f"{SCORE_PREFIX}{task}"] = pa.array(scores, pa.list_(pa.float32()))
        for name, column in added.items():
            table = table.append_column(name, column)
        if not (table := table.filter(pa.array(is_kept))).num_rows:
            return
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        target = self.folder / f"{now}-{os.getpid()}-{secrets.token_hex(4)}.parquet"
        with replacing(target) as file:
            pq.write_table(table, file)

    def _delete_old(self) -> None:
        oldest_s = time.time() - self.keep_days * _DAY_S
        for path in self.folder.glob("*.parquet"):
            if path.stat().st_mtime < oldest_s:
                path.unlink(missing_ok=True)


def forget(folder: pathlib.Path, user_id: str) -> int:
    """Deletes every logged request of a user, answered up to this second; returns how many had been written.

    Servers drop what they hold in memory instead of writing it. A file keeps its age, and so its day of deletion.
    """
    hashed, now_s, deleted = hashed_user(user_id, read_key(folder)), int(time.time()), 0
    with _locked(folder) as forgotten:
        # Before the files: whoever ends in between has told the servers at least.
        recent = {user: since_s for user, since_s in forgotten.items() if since_s > now_s - _FORGOTTEN_KEPT_S}
        write(folder / _FORGOTTEN_NAME, json.dumps(recent | {hashed: now_s}).encode())
        for path in sorted(folder.glob("*.parquet")):
            table = pq.read_table(path)
            if USER not in table.column_names:
                continue
            known = pa.array([user_id.strip(), hashed])
            is_user = pc.fill_null(pc.is_in(pc.utf8_trim_whitespace(table[USER]), known), False)
            if not (count := pc.sum(is_user).as_py()):
                continue
            deleted += count
            status = path.stat()
            with replacing(path) as file:
                pq.write_table(table.filter(pc.invert(is_user)), file)
                file.flush()
                os.utime(file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
    return deleted


def main(argv: list[str]) -> int:
    """Returns 0, or 2 if the folder cannot be read."""
    parser = Parser(prog="python -m gpsd_dist.serving.request_log", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=pathlib.Path, help="folder of --log_requests")
    parser.add_argument("--forget", required=True, metavar="USER", help="user id as it came in the requests")
    args = parser.parse_args(argv)
    try:
        if not args.folder.is_dir():
            raise ValueError(f"{args.folder} is no folder; give the one of --log_requests")
        if not (args.folder / _KEY_NAME).exists() and not any(args.folder.glob("*.parquet")):
            raise ValueError(
                f"{args.folder} has neither {_KEY_NAME} nor Parquet files; give the folder of --log_requests"
            )
        count = forget(args.folder, args.forget)
    except (OSError, ValueError, pa.ArrowException) as error:
        return say_error(error)
    sys.stdout.write(f"deleted {count} logged requests\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
