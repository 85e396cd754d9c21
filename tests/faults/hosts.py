"""Two hosts on one machine: network namespaces with names, addresses and a cable between them that can be pulled.

They share the file system, as cluster nodes share OUTPUT_DIR and the data. Needs root and iproute2.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import typing

import pytest

from tests.faults.jobs import ROOT, environment_of_a_job

LINK = "cable0"
PORT = 29_400


class TwoHosts:
    """`host-a` and `host-b`, as a context."""

    def __init__(self) -> None:
        self.names = {host: f"gpsd{os.getpid()}{host[-1]}" for host in ("host-a", "host-b")}
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> "TwoHosts":
        if os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("network namespaces need root and iproute2")
        result = subprocess.run(["ip", "netns", "add", self.names["host-a"]], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"`ip netns add` is not permitted here: {result.stderr.strip()}")
        _ip("netns", "add", self.names["host-b"])
        a, b = self.names.values()
        _ip("link", "add", LINK, "netns", a, "type", "veth", "peer", "name", LINK, "netns", b)
        for number, (host, name) in enumerate(self.names.items(), 1):
            folder = pathlib.Path("/etc/netns") / name  # `ip netns exec` puts these files over /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n")
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", LINK)
            for device in ("lo", LINK):
                _ip("-n", name, "link", "set", device, "up")
            assert self._run(host, "hostname") == host
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        for host, name in self.names.items():
            self.kill(host)
            subprocess.run(["ip", "netns", "del", name])
            shutil.rmtree(pathlib.Path("/etc/netns") / name, ignore_errors=True)

    def _inside(self, host: str, *command: str) -> list[str]:
        named = ["unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh", *command]
        return ["ip", "netns", "exec", self.names[host], *named]

    def _run(self, host: str, *command: str) -> str:
        return subprocess.run(self._inside(host, *command), capture_output=True, text=True, check=True).stdout.strip()

    def start(self, host: str, *arguments: str, log: pathlib.Path, **env: str) -> subprocess.Popen:
        """launch/multi_node.sh on one of two nodes, with one rank. Its output goes to `log`."""
        variables = {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": f"host-a:{PORT}", "RDZV_ID": "test"} | env
        command = self._inside(host, str(ROOT / "launch" / "multi_node.sh"), *arguments)
        with open(log, "a") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment_of_a_job() | variables, stdout=output, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    @contextlib.contextmanager
    def cut(self, host: str = "host-b") -> typing.Iterator[None]:
        """Inside, nothing that this host sends arrives anywhere, and nothing reaches it; no one is told."""
        _ip("-n", self.names[host], "link", "set", LINK, "down")
        try:
            yield
        finally:
            _ip("-n", self.names[host], "link", "set", LINK, "up")

    def kill(self, host: str) -> None:
        """Power off: every process of the host."""
        found = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True)
        for number in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), 9)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
