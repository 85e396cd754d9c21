"""`launch/slurm/train.sbatch` under a real Slurm: controller and node daemon on this machine, started here.

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge (`apt-get install`). Ranks are a stub; their
exit status, the signals and the queue are real.
"""

import os
import pathlib
import shutil
import socket
import subprocess
import time

import pytest

from tests.faults.jobs import ROOT

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "srun")
_MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(_MISSING), reason=f"Slurm is not installed: {_MISSING} are missing"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of Slurm need root"),
]

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# A rank: the first life waits for SIGTERM, saves a step and leaves with 75; a later one is done.
STUB = """#!/bin/bash
echo "${SLURM_RESTART_COUNT:-0}" >>starts
[[ ${SLURM_RESTART_COUNT:-0} -lt ${LIVES:-1} ]] || exit 0
trap 'echo saved >>saved; exit 75' TERM
sleep 200 &
wait
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which this test's own Slurm is asked."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=[_free_port(), _free_port()]))
    for number in range(8):  # train.sbatch asks for GPUs; any file will do
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{name}={folder / 'munge' / file}" for name, file in (("key-file", "key"), ("socket", "socket"))]
    munge += [f"--{name}-file={folder / 'munge' / name}" for name in ("pid", "log", "seed")]
    commands = (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host])
    running = []
    try:
        for command in commands:
            log = open(folder / f"{command[0]}.log", "w")  # noqa: SIM115  the daemon's
            running.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
            time.sleep(1)
        until_s = time.monotonic() + 60
        while "idle" not in _ask(env, "sinfo", "--noheader", "--format=%t"):
            logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
            assert time.monotonic() < until_s and all(part.poll() is None for part in running), logs
            time.sleep(0.5)
        yield env
    finally:
        for part in reversed(running):
            part.terminate()
            part.wait(timeout=30)


def _ask(env, *command: str) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture
def checkout(tmp_path) -> pathlib.Path:
    """Where jobs are submitted: the real train.sbatch, and ranks that are a stub."""
    (tmp_path / "launch" / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "slurm" / "train.sbatch", tmp_path / "launch" / "slurm")
    (tmp_path / "launch" / "multi_node.sh").write_text(STUB)
    (tmp_path / "launch" / "multi_node.sh").chmod(0o755)
    return tmp_path


def submit(env, checkout: pathlib.Path, *options: str, lives: int = 1) -> str:
    command = ["sbatch", "--parsable", *options, "launch/slurm/train.sbatch", "--gin.OUTPUT_DIR=run"]
    result = subprocess.run(command, env=env | {"LIVES": str(lives)}, cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def state(env, job: str) -> str:
    return _ask(env, "squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").strip()


def wait_for(condition, checkout: pathlib.Path, timeout_s: float = 120) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "\n".join(path.read_text() for path in checkout.glob("gpsd-*.out"))
        time.sleep(0.3)


def starts(checkout: pathlib.Path) -> list[str]:
    return (checkout / "starts").read_text().split() if (checkout / "starts").exists() else []


def test_a_job_that_is_asked_to_stop_saves_and_is_queued_again(slurm, checkout):
    job = submit(slurm, checkout)
    wait_for(lambda: starts(checkout) == ["0"], checkout)
    subprocess.run(["scancel", "--batch", "--signal=TERM", job], env=slurm, check=True)
    wait_for(lambda: starts(checkout) == ["0", "1"], checkout)
    wait_for(lambda: state(slurm, job) == "COMPLETED", checkout)
    assert (checkout / "saved").read_text() == "saved\n"


def test_a_job_at_its_time_limit_saves_and_is_queued_again(slurm, checkout):
    job = submit(slurm, checkout, "--time=1", "--signal=B:TERM@40")
    wait_for(lambda: starts(checkout) == ["0", "1"], checkout, timeout_s=180)
    wait_for(lambda: state(slurm, job) == "COMPLETED", checkout)


def test_a_job_that_is_cancelled_stays_cancelled(slurm, checkout):
    job = submit(slurm, checkout)
    wait_for(lambda: starts(checkout) == ["0"], checkout)
    subprocess.run(["scancel", job], env=slurm, check=True)
    wait_for(lambda: state(slurm, job) == "CANCELLED", checkout)
    time.sleep(10)  # longer than a job that was queued again waits
    assert starts(checkout) == ["0"] and state(slurm, job) == "CANCELLED"


def test_a_job_that_reaches_nothing_new_is_not_queued_for_ever(slurm, checkout):
    job = submit(slurm | {"MAX_IDLE_LIVES": "2"}, checkout, lives=99)
    for life in ("0", "1", "2"):
        wait_for(lambda life=life: starts(checkout)[-1:] == [life], checkout)
        subprocess.run(["scancel", "--batch", "--signal=TERM", job], env=slurm, check=True)
    wait_for(lambda: state(slurm, job) == "FAILED", checkout)
    (log,) = checkout.glob("gpsd-*.out")
    assert "not queued again: 2 lives in a row ended where they began (none-none)" in log.read_text()
