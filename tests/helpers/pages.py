"""Commands that stand in the pages: marked blocks, which tests run, and every line that calls `gpsd-dist`.

    <!-- runs -->          before a fence of `sh`: run in the default suite
    <!-- runs slow -->     the same, in the slow one

Blocks of a page run in their order in one shell: a later one may use files and background jobs of an earlier one.
"""

import pathlib
import re
import shlex
import sys

REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted([REPO_ROOT / "README.md", REPO_ROOT / "configs" / "README.md", *(REPO_ROOT / "docs").glob("*.md")])
_MARKED = re.compile(r"^<!-- runs( slow)? -->\n+^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^( *)```(\w*).*?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def marked_blocks(page: pathlib.Path, with_slow: bool) -> list[str]:
    """Commands of the page that are marked; those of the slow suite too, if wanted."""
    return [block for slow, block in _MARKED.findall(page.read_text()) if with_slow or not slow]


def has_slow_blocks(page: pathlib.Path) -> bool:
    return any(slow for slow, _ in _MARKED.findall(page.read_text()))


def program_calls(page: pathlib.Path) -> list[list[str]]:
    """Words after `gpsd-dist` of every such command in a fence, marked or not."""
    calls = []
    for _, language, block in _FENCE.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "sh", "console") else ():
            if line.strip().removeprefix("$ ").startswith("gpsd-dist "):
                calls.append(shlex.split(line.strip().removeprefix("$ "), comments=True)[1:])
    return calls


def write_programs(folder: pathlib.Path) -> None:
    """Puts `gpsd-dist` and `python` of this checkout into `folder`, which the test prepends to PATH."""
    folder.mkdir()
    for name, module in (("gpsd-dist", " -P -m gpsd_dist"), ("python", "")):
        text = f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(REPO_ROOT))} exec {shlex.quote(sys.executable)}{module} "$@"\n'
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
