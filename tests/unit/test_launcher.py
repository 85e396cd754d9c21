"""The exit status of the launcher, by how its ranks end. Ranks here are small scripts, torchrun is real."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gpsd_dist.distributed import exit_codes
from tests.helpers.sockets import LOOPBACK, listening

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(folder: pathlib.Path, code: str, max_restarts: int = 1) -> subprocess.Popen:
    """Two ranks that run `code`; each start of one adds the number of the attempt to `folder / starts`."""
    script = folder / "rank.py"
    begin = "import os, signal, sys, time\nattempt = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
    begin += f"open({str(folder / 'starts')!r}, 'a').write(attempt + '\\n')\n"
    script.write_text(begin + code)
    options = ["--nproc-per-node", "2", "--max-restarts", str(max_restarts), "--monitor-interval", "0.05"]
    command = [sys.executable, "-m", "gpsd_dist.launcher", "--standalone", *options, str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def attempts(folder: pathlib.Path) -> set[str]:
    """Numbers of the attempts in which a rank has begun."""
    return set((folder / "starts").read_text().split())


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


ENDINGS = {
    "finished": ("", exit_codes.FINISHED, False),
    "mistake": ("sys.exit(2)", exit_codes.MISTAKE, False),
    "no file": ("sys.exit(74)", exit_codes.NO_FILE_ACCESS, True),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", exit_codes.FAILED, True),
}


IN_DEFAULT_SUITE = ("mistake", "killed")  # each start of torchrun costs seconds


@pytest.mark.parametrize(
    "ending", [name if name in IN_DEFAULT_SUITE else pytest.param(name, marks=pytest.mark.slow) for name in ENDINGS]
)
def test_status_says_how_the_ranks_ended(tmp_path, ending):
    code, status, is_started_again = ENDINGS[ending]
    process = start(tmp_path, code)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    assert attempts(tmp_path) == ({"0", "1"} if is_started_again else {"0"})
    if status:
        assert f"status {status}" in stderr.splitlines()[-1] and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, exit_codes.STOPPED),
        pytest.param(signal.SIGINT, exit_codes.INTERRUPTED, marks=pytest.mark.slow),
    ],
)
def test_signal_reaches_the_ranks_and_shows_in_the_status(tmp_path, number, status):
    saved = tmp_path / "saved"
    code = (
        f"def save(number, frame):\n    time.sleep(0.3)\n    open({str(saved)!r}, 'a').write(str(number) + '\\n')\n"
        f"    sys.exit({status})\nsignal.signal({int(number)}, save)\n"
        f"open({str(tmp_path / 'up')!r}, 'a').write('x')\ntime.sleep(60)\n"
    )
    process = start(tmp_path, code)
    wait_for(lambda: (tmp_path / "up").exists() and (tmp_path / "up").read_text() == "xx", process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    assert saved.read_text().split() == [str(int(number))] * 2
    assert "Traceback" not in stderr


def test_a_second_signal_does_not_end_the_launcher_before_its_ranks_have_saved(tmp_path):
    up, asked, saved = (tmp_path / name for name in ("up", "asked", "saved"))
    code = (
        f"def save(number, frame):\n    open({str(asked)!r}, 'a').write('x')\n    time.sleep(2)\n"
        f"    open({str(saved)!r}, 'a').write('x')\n    sys.exit({exit_codes.STOPPED})\n"
        f"signal.signal(signal.SIGTERM, save)\nopen({str(up)!r}, 'a').write('x')\ntime.sleep(60)\n"
    )
    process = start(tmp_path, code)
    wait_for(lambda: up.exists() and up.read_text() == "xx", process)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: asked.exists() and asked.read_text() == "xx", process)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.wait(timeout=60) == exit_codes.STOPPED
    assert saved.read_text() == "xx"  # when the launcher ends, not later
    stderr = process.communicate(timeout=60)[1]
    assert stderr.count("got SIGTERM as well") == 1, stderr
    assert "launcher: got SIGTERM; its ranks have ended; status 75" in stderr.splitlines()[-1]


@pytest.mark.slow
def test_ranks_that_do_not_end_in_time_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    up = tmp_path / "up"
    code = (
        "if os.environ['RANK'] == '1':\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(up)!r}, 'a').write('x')\ntime.sleep(60)\n"
    )
    process = start(tmp_path, code)
    wait_for(lambda: up.exists() and up.read_text() == "xx", process)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == exit_codes.STOPPED, stderr
    assert "local rank 1 did not end within 1 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT) and was killed" in stderr


@pytest.mark.timeout(300)
def test_ranks_whose_launcher_is_killed_before_they_have_joined_leave_at_once(tmp_path, monkeypatch):
    """One waits for the other in the rendezvous of their group; the other comes to it as an orphan already."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    waiting, trained = (tmp_path / name for name in ("waiting", "trained"))
    code = (
        "from gpsd_dist.distributed.runtime import process_group\n"
        "if os.environ['RANK'] == '1':\n"
        f"    while not os.path.exists({str(waiting)!r}): time.sleep(0.05)\n"
        "    time.sleep(1)\n    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(0.5)\n"
        f"open({str(waiting)!r}, 'a').write('x')\n"
        f"with process_group(50):\n    open({str(trained)!r}, 'a').write('x')\n"
    )
    process = start(tmp_path, code)
    assert process.wait(timeout=200) == -signal.SIGKILL
    stderr = process.communicate(timeout=60)[1]  # until the ranks have ended, too
    assert not trained.exists(), stderr
    assert stderr.count(f"the launcher of this rank (process {process.pid}) has ended") == 2, stderr


@pytest.mark.slow
def test_lost_terminal_does_not_stop_a_job_under_nohup(tmp_path):
    up = tmp_path / "up"
    code = f"open({str(up)!r}, 'a').write('x')\ntime.sleep(2)\n"
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as nohup does it
    try:
        process = start(tmp_path, code)
    finally:
        signal.signal(signal.SIGHUP, previous)
    wait_for(lambda: up.exists() and up.read_text() == "xx", process)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_codes.FINISHED, stderr
    assert attempts(tmp_path) == {"0"}


def test_node_that_nobody_answers_says_so(tmp_path):
    command = [sys.executable, "-m", "gpsd_dist.launcher", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "192.0.2.1:29400", "--rdzv-conf", "read_timeout=1"]
    result = subprocess.run([*command, "nothing.py"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == exit_codes.FAILED
    last = result.stderr.splitlines()[-1]
    assert "launcher: the nodes of this job do not reach each other: " in last and "192.0.2.1" in last, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("how", ["launcher", pytest.param("alone", marks=pytest.mark.slow)])
def test_nothing_listens_beyond_loopback_in_a_run_on_one_machine(tmp_path, how):
    code = (
        "import torch, torch.distributed as dist\nfrom gpsd_dist.distributed.runtime import process_group\n"
        "with process_group(60) as runtime:\n    total = torch.ones(1)\n    dist.all_reduce(total)\n"
        f"    open({str(tmp_path / 'up')!r}, 'a').write(f'{{os.getpid()}} {{int(total)}}\\n')\n    time.sleep(60)\n"
    )
    process = start(tmp_path, code) if how == "launcher" else None
    if process is None:
        script = "import os, time\n" + code
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    num_ranks = 2 if how == "launcher" else 1
    up = tmp_path / "up"
    try:
        wait_for(lambda: up.exists() and up.read_text().count("\n") == num_ranks, process)
        ranks = [line.split() for line in up.read_text().splitlines()]
        assert {int(total) for _, total in ranks} == {num_ranks}  # they have met
        pids = [process.pid, *(int(pid) for pid, _ in ranks)]
        found = {pid: {address for address, _ in listening(pid)} for pid in pids}
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert set().union(*found.values()) <= LOOPBACK, found
    assert num_ranks == 1 or any(found.values())  # gloo does listen
