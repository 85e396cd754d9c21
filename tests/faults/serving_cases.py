"""Faults of exports and of servers: a reader sees the version of before or the new one, whole, and a server goes on."""

import contextlib
import errno
import json
import os
import pathlib
import random
import subprocess

from gpsd_dist.serving import artefact
from gpsd_dist.serving.artefact import ArtefactError, drafting, make_current, open_version
from gpsd_dist.serving.reload import Versions
from tests.faults.data_cases import failing_opens, forked
from tests.faults.file_cases import flip_bit, mounted, truncate
from tests.helpers.fake_scorer import make_current as point_at
from tests.helpers.fake_scorer import write_version
from tests.helpers.server_process import serving
from tests.integration.crash_points import die_at, in_child
from tests.unit.serving.test_artefact import write

_FAKE = "tests.helpers.fake_server"
_REQUEST = {"history.item": ["h"], "candidate.item": ["a", "bb"]}


def _checked(root: pathlib.Path) -> str:
    found = open_version(root)
    found.check_hashes()
    return found.version


def export_killed(folder: pathlib.Path) -> None:
    """kill -9 at random file operations."""
    root, choose = folder / "ctr", random.Random(19)
    write(root)
    for _ in range(5):
        before, point = _checked(root), choose.randrange(1, 25)

        def killed(point=point):
            die_at(point, str(root), str(folder / "operation"))
            write(root, f"point {point}")

        status = in_child(killed)
        assert status in (0, -9) and (_checked(root) != before or status)
    assert write(root, "next") == _checked(root)
    assert sorted(path.name for path in root.iterdir()) == [".lock", "blobs", "current.json", "versions"]


def export_on_a_full_disk(folder: pathlib.Path) -> None:
    with mounted(folder / "disk", "size=256k"):
        before = write(folder / "disk" / "ctr")
        try:
            write(folder / "disk" / "ctr", "large", (b"blob" * 300,))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            raise AssertionError("the disk was not full")
        assert _checked(folder / "disk" / "ctr") == before


def two_exports_at_once(folder: pathlib.Path) -> None:
    before = write(folder / "ctr")
    with drafting(folder / "ctr"):
        try:
            write(folder / "ctr", "second")
        except OSError as error:
            assert "another export is writing" in str(error)
    assert _checked(folder / "ctr") == before


def links_in_an_artefact_folder(folder: pathlib.Path) -> None:
    """In place of the lock, and of the pointer: refused, nothing outside is touched."""
    root, victim = folder / "ctr", folder / "victim"
    before = write(root)
    for name in (".lock", "current.json"):
        kept = (root / name).read_bytes()
        victim.write_text("precious")
        (root / name).unlink()
        (root / name).symlink_to(victim)
        try:
            write(root, "next")
        except OSError as error:
            assert f"{name} is a link" in str(error), error
        else:
            raise AssertionError("it was written through a link")
        assert victim.read_text() == "precious"
        (root / name).unlink()
        (root / name).write_bytes(kept)
    assert _checked(root) == before


def _damaged(folder: pathlib.Path, damage) -> None:
    root = folder / "ctr"
    write(root)
    damage(open_version(root))
    try:
        _checked(root)
    except ArtefactError as error:
        assert str(root) in str(error)
    else:
        raise AssertionError("the damage was not found")


def _blob(found: artefact.Artefact) -> pathlib.Path:
    return found.root / "blobs" / next(iter(found.description.blobs))


def flipped_bit_in_a_table(folder: pathlib.Path) -> None:
    _damaged(folder, lambda found: flip_bit(_blob(found)))


def truncated_table(folder: pathlib.Path) -> None:
    _damaged(folder, lambda found: truncate(_blob(found)))


def missing_file_of_a_version(folder: pathlib.Path) -> None:
    _damaged(folder, lambda found: (found.folder / "model.json").unlink())


def flipped_bit_in_a_description(folder: pathlib.Path) -> None:
    _damaged(folder, lambda found: flip_bit(found.folder / "artefact.json"))


def artefact_unreadable(folder: pathlib.Path) -> None:
    """EIO while a version is verified is no damage."""
    root = folder / "ctr"
    write(root)

    def verify() -> int:
        try:
            _checked(root)
        except ArtefactError:
            return 2
        except OSError:
            return 74
        return 0

    for part in ("current.json", "artefact.json", "model.json", open_version(root).root.name + "/blobs"):
        status, output = forked(folder, verify, failing_opens(part, errno.EIO))
        assert status == 74, output


def pointer_unreadable_for_a_moment(folder: pathlib.Path) -> None:
    """A server goes on, and takes the new version when it can read its name."""
    write_version(folder, "v1")
    versions = Versions(folder, _Version, lambda *_: None, contextlib.nullcontext())
    write_version(folder, "v2")
    os.rename(folder / "current.json", folder / "kept")
    versions.poll()
    assert versions.scorer().version == "v1"
    os.rename(folder / "kept", folder / "current.json")
    versions.poll()
    assert versions.scorer().version == "v2"


class _Version:
    def __init__(self, root: pathlib.Path):
        self.version = json.loads((root / "current.json").read_text())["version"]


def rollback_after_a_bad_version(folder: pathlib.Path) -> None:
    root = folder / "ctr"
    first = write(root)
    second = write(root, "second", (b"other",))
    flip_bit(_blob(open_version(root)))
    make_current(root, first)
    assert _checked(root) == first != second


def server_with_a_damaged_new_version(folder: pathlib.Path) -> None:
    """It stays out; the one before answers on, and a later good one is taken."""
    write_version(folder, "v1")
    with serving(folder, "--reload_s", 0.1, "--deadline_ms", 30_000, module=_FAKE, folder=folder) as server:
        write_version(folder, "v2", is_corrupt=True)
        server.wait_for(lambda: "not loaded, version v1 goes on" in server.log.read_text())
        assert server.score(_REQUEST)[1]["answers"][0]["version"] == "v1"
        write_version(folder, "v3")
        server.wait_for(lambda: server.score(_REQUEST)[1]["answers"][0]["version"] == "v3")
        assert server.end() == 0


def server_whose_worker_is_killed(folder: pathlib.Path) -> None:
    write_version(folder, "v1")
    with serving(folder, "--workers", 2, "--deadline_ms", 30_000, module=_FAKE, folder=folder) as server:
        server.wait_for(lambda: server.log.read_text().count("ready: ") == 2)
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(server.process.pid)], capture_output=True, text=True)
        os.kill(int(listed.stdout.split()[0]), 9)
        server.wait_for(lambda: server.log.read_text().count("ready: ") == 3)
        assert server.score(_REQUEST)[0] == 200
        assert server.end() == 0


def server_with_a_full_disk_for_its_log(folder: pathlib.Path) -> None:
    """Requests that cannot be logged are counted; scoring goes on."""
    write_version(folder, "v1")
    with mounted(folder / "log", "size=64k"):
        options = ("--log_requests", folder / "log", "--sample", 1, "--deadline_ms", 30_000)
        with serving(folder, *options, module=_FAKE, folder=folder) as server:
            (folder / "log" / "filler").write_bytes(b"\1" * (os.statvfs(folder / "log").f_bavail * 4096 - 4096))
            assert all(server.score(*[_REQUEST] * 50)[0] == 200 for _ in range(25))
            assert server.end() == 0
            assert "logged requests are lost" in server.log.read_text()


def server_whose_files_are_deleted(folder: pathlib.Path) -> None:
    """The pointer goes while it serves: the version in memory answers on."""
    write_version(folder, "v1")
    with serving(folder, "--reload_s", 0.1, "--deadline_ms", 30_000, module=_FAKE, folder=folder) as server:
        (folder / "current.json").unlink()
        server.wait_for(lambda: "cannot be read; version v1 goes on" in server.log.read_text())
        assert server.score(_REQUEST)[0] == 200
        point_at(folder, "v1")
        assert server.end() == 0


CASES = (
    export_killed,
    export_on_a_full_disk,
    two_exports_at_once,
    links_in_an_artefact_folder,
    flipped_bit_in_a_table,
    truncated_table,
    missing_file_of_a_version,
    flipped_bit_in_a_description,
    artefact_unreadable,
    pointer_unreadable_for_a_moment,
    rollback_after_a_bad_version,
    server_with_a_damaged_new_version,
    server_whose_worker_is_killed,
    server_with_a_full_disk_for_its_log,
    server_whose_files_are_deleted,
)
