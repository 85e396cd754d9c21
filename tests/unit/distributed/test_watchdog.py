"""What counts as progress, and what a hang says. Real hangs of real ranks: tests/faults."""

import os
import subprocess
import sys
import threading
import time

import pytest

from gpsd_dist.checkpoint import files, saving
from gpsd_dist.config import TrainConfig
from gpsd_dist.disk.writing import PIECE_BYTES
from gpsd_dist.distributed import exit_codes
from gpsd_dist.distributed.watchdog import FIRST_STEP_FACTOR, SYNC_TIMEOUT_S, Watchdog


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def watched(clock, timeout_s: float = 0.2, **options):
    """A watchdog with that clock, and the messages of hangs."""
    messages: list[str] = []
    ended = threading.Event()

    def end(message):
        messages.append(message)
        ended.set()

    return Watchdog(3, clock=clock, end=end, **options), messages, ended


def test_a_hang_names_rank_step_phase_and_last_collective():
    clock = Clock()
    watchdog, messages, ended = watched(clock)
    with watchdog.watching(0.2, first_step=6):
        watchdog.note("train step", step=8)
        watchdog.note("table lookup", is_collective=True)
        clock.now_s += 0.1
        watchdog.note("forward")
        clock.now_s += 0.3
        assert ended.wait(10)
    (message,) = messages
    assert "rank 3" in message and "Step 8, in 'forward'" in message
    assert "last collective begun: table lookup of step 8" in message and "hang_timeout_s" in message


@pytest.mark.parametrize("sign", ["note", "alive"])
def test_progress_of_either_kind_keeps_a_rank_alive(sign):
    clock = Clock()
    watchdog, messages, _ = watched(clock)
    with watchdog.watching(0.2, first_step=0):
        watchdog.note("train step", step=2)
        for _ in range(20):  # 3 s by the clock, 0.6 s for the thread to look at it
            clock.now_s += 0.15
            watchdog.note("validation") if sign == "note" else watchdog.alive()
            time.sleep(0.03)
    assert not messages


def test_the_first_step_of_a_process_may_take_longer():
    clock = Clock()
    watchdog, messages, ended = watched(clock)
    with watchdog.watching(0.2, first_step=6):
        watchdog.note("train step", step=7)
        clock.now_s += 0.2 * (FIRST_STEP_FACTOR - 0.5)
        time.sleep(0.2)
        assert not messages
        watchdog.note("train step", step=8)
        clock.now_s += 0.3
        assert ended.wait(10)


def test_waiting_for_a_save_is_no_hang_unless_this_rank_writes_and_is_stuck():
    clock = Clock()
    watchdog, messages, ended = watched(clock)
    with watchdog.watching(0.2, first_step=0):
        watchdog.note("checkpoint", step=9)
        with watchdog.waiting():  # other ranks write
            for _ in range(10):
                clock.now_s += 10
                time.sleep(0.03)
            with watchdog.writing():
                for _ in range(10):  # 1.5 s, but every part of the file is a sign of life
                    clock.now_s += 0.15
                    watchdog.alive()
                    time.sleep(0.03)
                assert not messages
                clock.now_s += 0.3
                assert ended.wait(10)


def test_nothing_is_watched_after_the_block_or_with_timeout_0():
    clock = Clock()
    watchdog, messages, _ = watched(clock)
    with watchdog.watching(0, first_step=0):
        watchdog.note("train step", step=9)
        clock.now_s += 1e6
        time.sleep(0.1)
    with watchdog.watching(0.2, first_step=0):
        pass
    clock.now_s += 1e6
    time.sleep(0.1)
    assert not messages


HANGS = {
    "python": ("time.sleep(60)", exit_codes.HUNG, "Step 5, in 'forward'"),
    # A C call that keeps the interpreter lock: no Python thread runs any more
    "interpreter lock": ("ctypes.PyDLL(None).sleep(60)", 1, "Timeout"),
}


@pytest.mark.parametrize("kind", HANGS)
def test_a_hanging_process_ends_with_stacks(kind):
    hang, status, words = HANGS[kind]
    code = (
        "import ctypes, os, time\nfrom gpsd_dist.distributed.watchdog import Watchdog\n"
        "def stuck_here():\n    " + hang + "\n"
        "watchdog = Watchdog(1, os.getppid())\nwith watchdog.watching(0.3, first_step=0):\n"
        "    watchdog.note('forward', step=5)\n    time.sleep(0.1)\n    stuck_here()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert result.returncode == status, result.stderr
    assert words in result.stderr and "stuck_here" in result.stderr


def test_a_process_whose_standard_error_nobody_reads_is_ended():
    """Its last words would wait for ever, and with them the end."""
    code = (
        "import os, sys, time\nfrom gpsd_dist.distributed.watchdog import Watchdog\n"
        "with Watchdog(1, os.getppid()).watching(0.3, first_step=0):\n    sys.stderr.write('x' * 1_000_000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    try:
        assert process.wait(timeout=50) == exit_codes.HUNG
    finally:
        process.kill()
        process.stderr.close()


def test_a_rank_whose_launcher_died_is_told_so(tmp_path):
    """The parent of the watched process ends at once; no torchrun is needed to be orphaned."""
    child = (
        "import os, pathlib, sys, time\nfrom gpsd_dist.distributed.watchdog import Watchdog\n"
        "watchdog, told = Watchdog(0, os.getppid()), []\nprint('up', flush=True)\n"
        "with watchdog.watching(0, 0, lambda: told.append(1)):\n"
        "    for _ in range(600):\n"
        "        time.sleep(0.05)\n"
        "        if told: break\n"
        f"pathlib.Path({str(tmp_path / 'told')!r}).write_text(str(len(told)))\n"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, text=True)\n"
        "p.stdout.readline()\ntime.sleep(0.2)\n"
    )
    subprocess.run([sys.executable, "-c", parent], timeout=60, check=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "told").exists() or not (tmp_path / "told").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (tmp_path / "told").read_text() == "1"


def test_a_long_sync_is_no_hang_and_an_endless_one_is():
    clock = Clock()
    watchdog, messages, ended = watched(clock)
    with watchdog.watching(0.2, first_step=0), watchdog.writing(), watchdog.syncing():
        watchdog.note("train step", step=2)
        clock.now_s += SYNC_TIMEOUT_S - 1
        time.sleep(0.1)  # several polls
        assert not messages
        clock.now_s += 2
        assert ended.wait(10)


def test_sixty_gigabytes_on_a_slow_disk_pass_with_the_default_options(tmp_path, monkeypatch):
    """A shard at 200 MB/s is 300 s of writing. Scaled down to 60 MB in pieces of 64 KB."""
    clock = Clock()
    watchdog, messages, _ = watched(clock)
    default, scale = TrainConfig(), 1000
    piece_bytes, bytes_per_s = PIECE_BYTES // scale, 200e6 / scale
    monkeypatch.setattr(files, "PIECE_BYTES", piece_bytes)
    silences = []

    def slow_fsync(number):
        size = os.fstat(number).st_size
        silences.append((size - sum(silences) * bytes_per_s) / bytes_per_s)
        clock.now_s += silences[-1]
        time.sleep(0.0005)  # for the thread of the watchdog

    monkeypatch.setattr(os, "fsync", slow_fsync)
    content = memoryview(bytes(60_000_000))
    with watchdog.watching(default.hang_timeout_s, first_step=9):
        watchdog.note("train step", step=20)
        with files._Files(watchdog).create_stream(tmp_path / "__0_0.distcp", "wb") as stream:
            stream.write(content)  # one tensor in one call, as torch writes it
    assert not messages and 299 < sum(silences) < 301
    assert max(silences) < 1 < default.hang_timeout_s  # s between two signs of life
    # The other ranks wait for this one no longer than gloo lets them.
    assert sum(silences) < saving._LONGEST_WAIT_S and PIECE_BYTES / SYNC_TIMEOUT_S < 40_000  # bytes per second
