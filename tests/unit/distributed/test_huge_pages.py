"""Huge pages are asked for where glibc has them, in every process that a launcher starts, and a user's choice wins."""

import os
import subprocess
import sys

import pytest

from gpsd_dist.commands import execute
from gpsd_dist.distributed import huge_pages

SETTING = "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("version", "given", "wanted"),
    [
        ("glibc 2.35", None, SETTING),
        ("glibc 2.41", "glibc.malloc.arena_max=1", f"glibc.malloc.arena_max=1:{SETTING}"),
        ("glibc 2.41", "glibc.malloc.hugetlb=0", None),
        ("glibc 2.34", None, None),
        ("musl", None, None),
        (None, None, None),
    ],
)
def test_the_variable_of_a_child(monkeypatch, version, given, wanted):
    monkeypatch.setattr(os, "confstr", lambda name: version)
    current = {} if given is None else {"GLIBC_TUNABLES": given}
    assert huge_pages.environment(current) == ({} if wanted is None else {"GLIBC_TUNABLES": wanted})


def test_commands_and_launch_scripts_set_it(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    wanted = huge_pages.environment().get("GLIBC_TUNABLES", "")
    lines = []
    execute(("-c", "import os; print(os.environ.get('GLIBC_TUNABLES', ''))"), on_line=lines.append)
    script = 'num_cores=1 NPROC=1; source launch/env.sh; echo "${GLIBC_TUNABLES-}"'
    shell = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout.strip()
    assert lines == [wanted] and shell == wanted
    assert sys.platform != "linux" or wanted == SETTING  # every Linux that the tests run on has glibc 2.35
