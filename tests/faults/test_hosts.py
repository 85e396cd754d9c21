"""launch/multi_node.sh on two hosts with a cable between them (network namespaces), and what happens when it is pulled.

One host with two ranks is the reference: where the ranks are changes no bit.
"""

import json
import pathlib
import time

import pytest

from gpsd_dist.distributed import exit_codes
from tests.faults.hosts import TwoHosts
from tests.faults.jobs import Run, Workshop, wait_until
from tests.integration.tiny_data import differing, read_checkpoint, step_folder, train_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EPOCHS, STEPS, CUT_AT = 12, 72, 13
HANG_S, LIMIT_S = 8, 240


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("hosts"))


OVERRIDES = (
    f"--gin.EPOCHS={EPOCHS}",
    f"--gin.TrainConfig.hang_timeout_s={HANG_S}",
    "--gin.TrainConfig.save_interval_steps=10",
)


@pytest.fixture(scope="module")
def reference(workshop):
    run = Run(workshop, "one_host")
    assert run.train(None, *OVERRIDES).status == exit_codes.FINISHED
    return run


@pytest.fixture
def hosts():
    with TwoHosts() as hosts:
        yield hosts


class Job:
    """A run on both hosts."""

    def __init__(self, hosts: TwoHosts, run: Run, **env: str):
        self.hosts, self.run, self.env = hosts, run, env
        options = ["--gin_file", "configs/stage/pretrain.gin", "--gin_file", str(run.workshop.root / "options.gin")]
        options += [f"--gin.DATA_DIR={run.data_dir}", f"--gin.OUTPUT_DIR={run.output}", *OVERRIDES]
        self.options = options
        self.processes = {host: self.start(host) for host in hosts.names}

    def start(self, host: str):
        return self.hosts.start(host, *self.options, log=self.log(host), **self.env)

    def log(self, host: str) -> pathlib.Path:
        return self.run.folder / f"{host}.log"

    def step(self) -> int:
        lines = _lines(self.run.output / "metrics.jsonl")
        return json.loads(lines[-1])["step"] if lines else 0

    def wait(self) -> dict[str, int]:
        """Exit status of each host."""
        wait_until(lambda: all(p.poll() is not None for p in self.processes.values()), self.logs(), LIMIT_S)
        return {host: process.returncode for host, process in self.processes.items()}

    def logs(self) -> str:
        return "\n".join(f"{host}:\n{self.log(host).read_text()}" for host in self.hosts.names)


def _lines(path: pathlib.Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []


def check_equals(run: Run, reference: Run) -> None:
    mine, theirs = (read_checkpoint(step_folder(one.output, STEPS)) for one in (run, reference))
    assert not differing(mine, theirs)
    assert train_losses(run.output) == train_losses(reference.output)


def test_two_hosts_give_the_bits_of_one(workshop, reference, hosts):
    run = Run(workshop, "two_hosts")
    job = Job(hosts, run)
    assert set(job.wait().values()) == {exit_codes.FINISHED}, job.logs()
    assert " on 2 x cpu" in job.logs() and len(hosts.names) == 2
    check_equals(run, reference)


def test_short_cut_is_ridden_out(workshop, reference, hosts):
    """TCP sends again what was lost: no rank notices, none is restarted."""
    run = Run(workshop, "short_cut")
    job = Job(hosts, run)
    wait_until(lambda: job.step() >= CUT_AT, job.logs())
    with hosts.cut():
        time.sleep(HANG_S / 4)
    assert set(job.wait().values()) == {exit_codes.FINISHED}, job.logs()
    assert job.logs().count("weights: ") == 1 and "watchdog" not in job.logs()
    check_equals(run, reference)


def test_long_cut_is_found_on_both_sides_and_the_job_goes_on_after_it(workshop, reference, hosts):
    """No error reaches a socket whose other end is silent: only the watchdog ends the ranks."""
    run = Run(workshop, "long_cut")
    job = Job(hosts, run)
    wait_until(lambda: job.step() >= CUT_AT, job.logs())
    with hosts.cut():
        time.sleep(3 * HANG_S)
        for host in hosts.names:
            log = job.log(host).read_text()
            assert "watchdog: rank" in log and f"(host {host}, pid" in log and "last collective begun" in log, log
        at_cut = job.step()
        time.sleep(1)
        assert job.step() == at_cut  # nothing goes on alone
    assert set(job.wait().values()) == {exit_codes.FINISHED}, job.logs()
    assert "weights: resumed from" in job.logs()
    check_equals(run, reference)


def test_host_that_lost_its_power_comes_back(workshop, reference, hosts):
    """The other one waits for it; the launcher that is started on it again is all it takes."""
    run = Run(workshop, "power")
    job = Job(hosts, run)
    wait_until(lambda: job.step() >= CUT_AT, job.logs())
    hosts.kill("host-b")
    job.processes["host-b"].wait(30)
    time.sleep(2)
    assert job.processes["host-a"].poll() is None, job.logs()
    job.processes["host-b"] = job.start("host-b")
    assert set(job.wait().values()) == {exit_codes.FINISHED}, job.logs()
    assert "weights: resumed from" in job.logs()
    check_equals(run, reference)
