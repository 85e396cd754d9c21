"""`checksums.json` of a checkpoint: SHA-256 and size of each of its files, and the check against them.

Finds what rots: flipped bits, truncated and missing files. It does not find forgery; who can write a checkpoint can
write its checksums.
"""

import collections.abc
import dataclasses
import hashlib
import json
import logging
import typing

import torch.distributed as dist

from gpsd_dist.checkpoint import storage
from gpsd_dist.checkpoint.storage import Location

log = logging.getLogger(__name__)
CHECKSUMS_NAME = "checksums.json"
STATE_NAME = "run_state.json"
VERSION = 1
_CHUNK_BYTES = 4 * 2**20  # untuned
_MAX_TIME_S = 250_000_000_000  # the year 9892: dates can be shown


class DamagedCheckpoint(ValueError):
    """Files of a checkpoint are missing or not what was written; the message names them."""


@dataclasses.dataclass(frozen=True)
class FileSum:
    """What one file has to be."""

    sha256: str
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Checksums:
    """Content of `checksums.json`."""

    time_s: float
    """When the checkpoint was written, epoch seconds."""
    files: dict[str, FileSum]

    def to_json(self) -> bytes:
        """The file's content."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1).encode()


def sum_of(content: bytes) -> FileSum:
    """For a file that has this content."""
    return FileSum(hashlib.sha256(content).hexdigest(), len(content))


def read_checksums(checkpoint: Location) -> Checksums | None:
    """None: saved by a version that wrote none.

    DamagedCheckpoint if the file is broken, or missing where one was written; ValueError if it is newer.
    """
    path = checkpoint / CHECKSUMS_NAME
    if not path.is_file():
        if _has_checksums(checkpoint):
            raise DamagedCheckpoint(f"{path} is missing, and {STATE_NAME} says that it was written")
        return None
    try:
        raw = storage.read_json(path)
        version, time_s, entries = raw.get("version"), raw.get("time_s"), raw.get("files")
        if not isinstance(version, int) or not isinstance(entries, dict):
            raise ValueError("it has no version or no files")
        if version <= VERSION:
            if not isinstance(time_s, int | float) or not 0 <= time_s < _MAX_TIME_S:
                raise ValueError("it has no time")
            return Checksums(time_s, {_checked_name(name): _file_sum(entry) for name, entry in entries.items()})
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error})") from error
    raise ValueError(f"{path} has version {version}, this program knows {VERSION}: use a newer one")


def saved_at_s(checkpoint: Location) -> float:
    """When it was written, epoch seconds. ValueError if that is not known any more."""
    checksums = read_checksums(checkpoint)
    if checksums is not None:
        return checksums.time_s
    if isinstance(checkpoint, storage.Remote):
        raise DamagedCheckpoint(f"{checkpoint / CHECKSUMS_NAME} is missing")
    return (checkpoint / STATE_NAME).stat().st_mtime  # of a version before checksums


def _has_checksums(checkpoint: Location) -> bool:
    """What its state says; False if that cannot be read, which who reads it says."""
    try:
        return storage.read_json(checkpoint / STATE_NAME).get("has_checksums") is True
    except (ValueError, FileNotFoundError):
        return False


def _checked_name(name: str) -> str:
    if not storage.is_plain_name(name):
        raise ValueError(f"it names {name[:80]!r}, which is no file of the folder")
    return name


def _file_sum(entry: typing.Any) -> FileSum:
    digest, size = (entry.get("sha256"), entry.get("num_bytes")) if isinstance(entry, dict) else (None, None)
    if not isinstance(digest, str) or type(size) is not int or not 0 <= size < 2**62:
        raise ValueError("it has a file without sha256 or num_bytes")
    return FileSum(digest, size)


def wrong_sizes(checkpoint: Location, checksums: Checksums) -> list[str]:
    """Files that are missing or have another size, with what is wrong; reads none of them."""
    problems = []
    for name, expected in sorted(checksums.files.items()):
        try:
            found = storage.num_bytes(checkpoint / name)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
            continue
        if found != expected.num_bytes:
            problems.append(f"{name} has {found:,} bytes, {expected.num_bytes:,} were written")
    return problems


def wrong_files(checkpoint: Location, checksums: Checksums, names: collections.abc.Iterable[str]) -> list[str]:
    """Of the files `names`: those that are not what was written, with what is wrong. Reads them whole."""
    some = Checksums(checksums.time_s, {name: checksums.files[name] for name in names})
    problems = wrong_sizes(checkpoint, some)
    named = {problem.split(" ", 1)[0] for problem in problems}
    for name in sorted(set(some.files) - named):
        digest = hashlib.sha256()
        with (checkpoint / name).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != some.files[name].sha256:
            problems.append(f"{name} is not what was written (its SHA-256 differs)")
    return problems


def check(checkpoint: Location) -> None:
    """Compares every file with its checksum; the ranks share the files out. Collective if there is a process group.

    On all ranks alike: DamagedCheckpoint names the files; OSError if a rank could not read (that is no damage).
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problems: list[str] = []
    failure = None
    try:
        checksums = read_checksums(checkpoint)
        if checksums is None:
            if rank == 0:
                log.warning("%s was saved without checksums, by an older version: it is not verified", checkpoint)
        else:
            problems = wrong_files(checkpoint, checksums, sorted(checksums.files)[rank::world_size])
    except DamagedCheckpoint as error:
        problems = [str(error)]
    except (OSError, ValueError) as error:
        failure = f"rank {rank} cannot verify {checkpoint}: {error}"
    found: list[tuple[list[str], str | None]] = [([], None)] * world_size
    if world_size > 1:
        dist.all_gather_object(found, (problems, failure))
    else:
        found = [(problems, failure)]
    failures = [text for _, text in found if text]
    if failures:
        raise OSError("; ".join(failures))
    damaged = sorted({problem for part, _ in found for problem in part})
    if damaged:
        raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {'; '.join(damaged)}")


def merged(parts: collections.abc.Iterable[typing.Mapping[str, FileSum]]) -> dict[str, FileSum]:
    """The files of all ranks in one dict, by name."""
    files = {name: entry for part in parts for name, entry in part.items()}
    return dict(sorted(files.items()))
