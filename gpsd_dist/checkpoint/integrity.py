"""Verifies checkpoints by `checksums.json`, which has SHA-256 and size of each file.

This finds what rots: flipped bits, truncated and missing files. It does not find forgery, because whoever can write a
checkpoint can write its checksums.
"""

import collections.abc
import dataclasses
import functools
import hashlib
import json
import logging
import typing

from gpsd_dist.checkpoint import storage
from gpsd_dist.checkpoint.storage import Location
from gpsd_dist.disk import reading

log = logging.getLogger(__name__)
CHECKSUMS_NAME = "checksums.json"
STATE_NAME = "run_state.json"
VERSION = 1
_CHUNK_BYTES = 4 * 2**20  # untuned
_MAX_TIME_S = 250_000_000_000  # the year 9892: dates can be shown


class DamagedCheckpoint(ValueError):
    """Raised where files of a checkpoint are missing or not what was written; the message names them."""


@dataclasses.dataclass(frozen=True)
class FileSum:
    """Size and hash that one file must have."""

    sha256: str
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Checksums:
    """Content of `checksums.json`."""

    time_s: float  # When the checkpoint was written, epoch seconds
    files: dict[str, FileSum]

    def to_json(self) -> bytes:
        """Returns the content of the file."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1).encode()


def sum_of(content: bytes) -> FileSum:
    """Computes the checksum of a file with this content."""
    return FileSum(hashlib.sha256(content).hexdigest(), len(content))


def read_checksums(checkpoint: Location) -> Checksums | None:
    """Reads `checksums.json`. None if the checkpoint was saved by a version that wrote none.

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
    """Returns when the checkpoint was written, in epoch seconds. ValueError if that is lost."""
    checksums = read_checksums(checkpoint)
    if checksums is not None:
        return checksums.time_s
    if isinstance(checkpoint, storage.Remote):
        raise DamagedCheckpoint(f"{checkpoint / CHECKSUMS_NAME} is missing")
    return (checkpoint / STATE_NAME).stat().st_mtime  # saved by a version before checksums


def _has_checksums(checkpoint: Location) -> bool:
    """Tells whether `run_state.json` says that checksums were written. False if that file is broken."""
    try:
        return storage.read_json(checkpoint / STATE_NAME).get("has_checksums") is True
    except (ValueError, FileNotFoundError):
        return False


def _checked_name(name: str) -> str:
    """Returns `name` if it stays inside the folder, else raises ValueError."""
    if not storage.is_plain_name(name):
        raise ValueError(f"it names {name[:80]!r}, which is no file of the folder")
    return name


def _file_sum(entry: typing.Any) -> FileSum:
    digest, size = (entry.get("sha256"), entry.get("num_bytes")) if isinstance(entry, dict) else (None, None)
    if not isinstance(digest, str) or type(size) is not int or not 0 <= size < 2**62:
        raise ValueError("it has a file without sha256 or num_bytes")
    return FileSum(digest, size)


def wrong_sizes(checkpoint: Location, checksums: Checksums) -> list[str]:
    """Describes the files that are missing or have another size. Reads none of them."""
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
    """Describes those of the files `names` that are not what was written. Reads them whole."""
    some = Checksums(checksums.time_s, {name: checksums.files[name] for name in names})
    problems = wrong_sizes(checkpoint, some)
    named = {problem.split(" ", 1)[0] for problem in problems}
    for name in sorted(set(some.files) - named):
        if reading.again(checkpoint / name, functools.partial(_sha256, checkpoint / name)) != some.files[name].sha256:
            problems.append(f"{name} is not what was written (its SHA-256 differs)")
    return problems


def _sha256(path: Location) -> str:
    digest = hashlib.sha256()
    with storage.open_read(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check(checkpoint: Location) -> None:
    """Compares every file with its checksum; ranks share the files out. Collective if there is a process group.

    All ranks raise alike: DamagedCheckpoint names the files; OSError if a rank could not read, which is no damage.
    """
    import torch.distributed as dist  # Here, so that a report reads checkpoint folders without torch.

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
    if failures:  # reading was tried again and again: no rank knows of damage
        raise reading.NotReadableNow("; ".join(failures))
    damaged = sorted({problem for part, _ in found for problem in part})
    if damaged:
        raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {'; '.join(damaged)}")


def merged(parts: collections.abc.Iterable[typing.Mapping[str, FileSum]]) -> dict[str, FileSum]:
    """Merges the files that each rank wrote into one dict, sorted by name."""
    files = {name: entry for part in parts for name, entry in part.items()}
    return dict(sorted(files.items()))
