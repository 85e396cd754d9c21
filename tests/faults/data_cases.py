"""Faults of builds of data sets and of what they wrote. Each leaves the data set of before, and the next build works.

A case gets a new folder. Its build runs in a forked process, which the fault stops, kills or deceives.
"""

import errno
import fcntl
import gzip
import os
import pathlib
import random
import shutil
import signal
import sys
import typing

import pyarrow.parquet as pq

from data_pipeline import build, validate
from gpsd_dist.data import data_versions
from gpsd_dist.data.parquet_dataset import ParquetSplit
from gpsd_dist.schema import read_manifest
from tests.faults.file_cases import flip_bit, mounted, truncate
from tests.unit.data_pipeline.test_kills import content, first_builds, killed_at

_NUM_KILLS = 3


def forked(folder: pathlib.Path, work: typing.Callable[[], int], fault=None) -> tuple[int, str]:
    """(status, output) of `work` in a process of its own, which first calls `fault`; a signal is a negative status."""
    output = folder / "output.txt"
    child = os.fork()
    if child == 0:
        number = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(number, 1)
        os.dup2(number, 2)
        try:
            if fault is not None:
                fault()
            os._exit(work())
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output.read_text()


def failing_opens(part: str, number: int) -> typing.Callable[[], None]:
    """A fault: every opening of a file whose path holds `part` fails."""

    def hook(event: str, details: tuple) -> None:
        if event == "open" and part in str(details[0]):
            raise OSError(number, os.strerror(number))

    return lambda: sys.addaudithook(hook)


def stopping_at(event: str, part: str, number: int) -> typing.Callable[[], None]:
    """A fault: this process gets a signal when it does that with a file whose path holds `part`."""

    def hook(seen: str, details: tuple) -> None:
        if seen == event and part in str(details[0]):
            os.kill(os.getpid(), number)

    return lambda: sys.addaudithook(hook)


def _goes_on(target: pathlib.Path, arguments: list[str], folder: pathlib.Path) -> None:
    status, output = forked(folder, lambda: build.main(arguments))
    assert status == 0, output
    validate.check(target)


def _killed(folder: pathlib.Path, scenario: str) -> None:
    """kill -9 at random file operations: the version of before, byte for byte, or the new one, whole."""
    target, arguments = first_builds(folder, scenario)
    before, version = content(data_versions.current(target)), data_versions.current(target)
    choose = random.Random(scenario)
    for _ in range(_NUM_KILLS):
        if killed_at(choose.randrange(1, 60), target.parent, arguments):
            validate.check(target)
            assert content(version) == before
    _goes_on(target, [word for word in arguments if word != "--force"], folder)


def build_killed(folder: pathlib.Path) -> None:
    _killed(folder, "replace")


def append_killed(folder: pathlib.Path) -> None:
    _killed(folder, "append")


def holdout_killed(folder: pathlib.Path) -> None:
    _killed(folder, "holdout")


def _refused(folder: pathlib.Path, fault, status: int, *words: str, scenario: str = "replace") -> None:
    """The build ends with that status and words; the data set is that of before; the same command goes on."""
    target, arguments = first_builds(folder, scenario)
    before = content(target)
    ended, output = forked(folder, lambda: build.main(arguments), fault)
    assert ended == status, output
    assert all(word in output for word in words) and "Traceback" not in output, output
    assert content(target) == before
    _goes_on(target, arguments, folder)


def build_stopped(folder: pathlib.Path) -> None:
    """SIGTERM while it writes its manifest."""
    _refused(folder, stopping_at("open", "manifest.json", signal.SIGTERM), build.STOPPED, "no data set was changed")


def build_interrupted(folder: pathlib.Path) -> None:
    _refused(folder, stopping_at("open", "manifest.json", signal.SIGINT), build.INTERRUPTED, "no data set was changed")


def raw_file_unreadable(folder: pathlib.Path) -> None:
    """EIO of a raw file is no damage: status 74, where 2 would say that a new start is useless."""
    words = ("cannot be read now", os.strerror(errno.EIO))
    _refused(folder, failing_opens("shown.csv", errno.EIO), build.NO_FILE_ACCESS, *words)


def built_file_unreadable(folder: pathlib.Path) -> None:
    """The version that is appended to: ESTALE."""
    words = ("cannot be read now", os.strerror(errno.ESTALE))
    fault = failing_opens("place/out/current.json", errno.ESTALE)
    _refused(folder, fault, build.NO_FILE_ACCESS, *words, scenario="append")


def build_on_a_full_disk(folder: pathlib.Path) -> None:
    with mounted(folder / "disk", "size=16m"):
        target, arguments = first_builds(folder / "disk", "replace")
        before = content(target)
        space = os.statvfs(folder / "disk")
        (folder / "disk" / "filler").write_bytes(b"\1" * (space.f_bavail * space.f_frsize - 20_000))
        status, output = forked(folder, lambda: build.main(arguments))
        assert status == build.NO_FILE_ACCESS and "No space left" in output, output
        assert content(target) == before
        (folder / "disk" / "filler").unlink()
        _goes_on(target, arguments, folder)


def two_builds_of_one_folder(folder: pathlib.Path) -> None:
    target, arguments = first_builds(folder, "replace")
    with open(target / ".build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, output = forked(folder, lambda: build.main(arguments))
    assert status == build.MISTAKE and "another build is at work" in output, output
    _goes_on(target, arguments, folder)


def links_in_a_data_folder(folder: pathlib.Path) -> None:
    """Names of files that a build writes, aside or at last, lead out: nothing outside is touched."""
    target, arguments = first_builds(folder, "replace")
    victim = folder / "victim"
    victim.write_text("precious")
    for name in (".current.json.tmp", "current.json.tmp", "versions/.building"):
        (target / name).symlink_to(victim)
    forked(folder, lambda: build.main(arguments))
    (target / ".build.lock").symlink_to(victim)
    status, output = forked(folder, lambda: build.main(arguments))
    assert status == build.MISTAKE and ".build.lock is a link" in output, output
    assert victim.read_text() == "precious"
    (target / ".build.lock").unlink()
    (target / "versions" / ".building").unlink(missing_ok=True)
    _goes_on(target, arguments, folder)


def pipe_in_place_of_the_pointer(folder: pathlib.Path) -> None:
    """An error at once for a reader; it used to wait for ever."""
    target, _ = first_builds(folder, "replace")
    pointer = (target / "current.json").read_bytes()
    (target / "current.json").unlink()
    os.mkfifo(target / "current.json")
    try:
        data_versions.current(target)
    except OSError as error:
        assert "is a pipe" in str(error)
    else:
        raise AssertionError("the pipe was read")
    (target / "current.json").unlink()
    (target / "current.json").write_bytes(pointer)
    validate.check(target)


def _damaged(folder: pathlib.Path, damage: typing.Callable[[pathlib.Path], None]) -> None:
    """`validate` and a reader name the file; with the copy back, both are content."""
    target, _ = first_builds(folder, "replace")
    version = data_versions.current(target)
    path = next((version / "train").glob("*.parquet"))
    kept = path.read_bytes()
    damage(path)

    def read() -> None:
        split = ParquetSplit(version, read_manifest(version), "train")
        for group in range(len(split.groups)):
            split.read_group(group)

    for look in (lambda: validate.check(target), read):
        try:
            look()
        except ValueError as error:
            assert path.name in str(error), error
        else:
            raise AssertionError("the damage was not found")
    path.write_bytes(kept)
    validate.check(target)


def flipped_bit_in_a_built_file(folder: pathlib.Path) -> None:
    _damaged(folder, flip_bit)


def truncated_built_file(folder: pathlib.Path) -> None:
    _damaged(folder, truncate)


def missing_built_file(folder: pathlib.Path) -> None:
    _damaged(folder, pathlib.Path.unlink)


def empty_built_file(folder: pathlib.Path) -> None:
    _damaged(folder, lambda path: path.write_bytes(b""))


def flipped_bit_in_a_raw_archive(folder: pathlib.Path) -> None:
    """The checksum of gzip is looked at; the data set of before stays."""
    target, arguments = first_builds(folder, "replace")
    raw = folder / "zipped"
    shutil.copytree(folder / "later", raw)
    packed = bytearray(gzip.compress((raw / "shown.csv").read_bytes(), 0))
    (raw / "shown.csv").unlink()
    packed[len(packed) // 2] ^= 4
    (raw / "shown.csv.gz").write_bytes(packed)
    schema = next(raw.glob("*.toml"))
    schema.write_text(schema.read_text().replace("shown.csv", "shown.csv.gz"))
    broken = [str(raw) if word == str(folder / "later") else word for word in arguments]
    before = content(target)
    status, output = forked(folder, lambda: build.main(broken))
    assert status == build.MISTAKE and "shown.csv.gz" in output, output
    assert content(target) == before


def reader_of_a_version_that_is_replaced(folder: pathlib.Path) -> None:
    """Whoever has opened a version reads all of it, though two builds have come since."""
    target, arguments = first_builds(folder, "replace")
    version = data_versions.opened(target)
    before = content(version)
    for _ in range(2):
        _goes_on(target, arguments, folder)
    assert content(version) == before and data_versions.current(target) != version
    data_versions.release()


def half_a_log(folder: pathlib.Path) -> None:
    """The raw file is cut in the middle of a line: refused with the line, nothing built."""
    target, arguments = first_builds(folder, "replace")
    later = folder / "later" / "shown.csv"
    whole, before = later.read_bytes(), content(target)
    later.write_bytes(whole[: len(whole) - 3].rsplit(b",", 1)[0])
    status, output = forked(folder, lambda: build.main(arguments))
    assert status == build.MISTAKE and "shown.csv" in output, output
    assert content(target) == before
    later.write_bytes(whole)
    _goes_on(target, arguments, folder)


def rotten_page_under_a_reader(folder: pathlib.Path) -> None:
    """A bit flips after the file was opened: the checksum of the page is looked at when it is read."""
    target, _ = first_builds(folder, "replace")
    version = data_versions.current(target)
    split = ParquetSplit(version, read_manifest(version), "train")
    path = split.groups[0].path
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    packed = bytearray(path.read_bytes())
    packed[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 5] ^= 16
    path.write_bytes(packed)
    try:
        split.read_group(0)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        raise AssertionError("the rotten page was read")


CASES = (
    build_killed,
    append_killed,
    holdout_killed,
    build_stopped,
    build_interrupted,
    raw_file_unreadable,
    built_file_unreadable,
    build_on_a_full_disk,
    two_builds_of_one_folder,
    links_in_a_data_folder,
    pipe_in_place_of_the_pointer,
    flipped_bit_in_a_built_file,
    truncated_built_file,
    missing_built_file,
    empty_built_file,
    flipped_bit_in_a_raw_archive,
    reader_of_a_version_that_is_replaced,
    half_a_log,
    rotten_page_under_a_reader,
)
