"""Children whose lines are read and whose time may end; that SIGTERM reaches them: scaling/test_runs.py."""

import os
import signal
import subprocess
import time

import pytest

from gpsd_dist import commands
from gpsd_dist.cli import names
from gpsd_dist.commands import OutOfTime, Stopped, execute, python_command, shell

WAITS = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit({status})))\n"
    "print('ready', flush=True)\n"
    "time.sleep(60)\n"
)


def test_every_line_of_both_streams_is_read():
    lines, said = [], []
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.stdout.write('no end')"
    execute(("-c", code), on_line=lines.append, say=said.append)
    assert sorted(lines) == ["err", "no end", "out"] and said[0].startswith("$ python -c ")


def test_a_child_whose_time_is_up_may_save():
    for time_s in (2, 10, 50):  # a busy machine may not start Python in two seconds
        lines = []
        with pytest.raises(OutOfTime, match="its time was up during: python -c"):
            execute(("-c", WAITS.format(status=75)), on_line=lines.append, deadline_s=time.monotonic() + time_s)
        if "ready" in lines:
            break
    assert lines == ["ready", "saved"]


def test_a_child_that_finishes_in_time_has_no_deadline():
    execute(("-c", "pass"), deadline_s=time.monotonic() + 60)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        execute(("-c", "raise SystemExit(3)"), deadline_s=time.monotonic() + 60)
    assert caught.value.returncode == 3


def test_sigterm_while_a_child_is_started_reaches_it(monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(commands.subprocess, "Popen", Interrupted)
    with pytest.raises(Stopped):
        execute(("-c", "import time; time.sleep(60)"))
    assert started[0].returncode == -signal.SIGTERM and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_commands_can_be_typed():
    assert shell(python_command(1, "gpsd_dist.train", "--gin.OUTPUT_DIR=my runs")) == (
        "python -m gpsd_dist.train '--gin.OUTPUT_DIR=my runs'"
    )
    assert python_command(2, "m", "a") == (
        *("-m", "gpsd_dist.launcher", "--nproc_per_node", "2", "--standalone", "-m", "m", "a"),
    )


def test_children_of_the_program_run_nothing_of_the_folder_they_are_started_in(tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise SystemExit('not the standard library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(names.STARTED_BY, names.PROGRAM)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    lines = []
    execute(("-m", "gpsd_dist.launcher", "--help"), on_line=lines.append)
    execute(("-c", "import random; print(random.random() < 1)"), on_line=lines.append)
    assert lines[0].startswith("usage: ") and lines[-1] == "True"
