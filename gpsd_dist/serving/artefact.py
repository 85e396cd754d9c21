"""Lays out, writes and opens artefacts: what serving needs of a trained model, as immutable versions.

    artefacts/ctr/current.json               {"version", "sha256"} of the version in use; replaced atomically
    artefacts/ctr/blobs/<sha256>             parts of embedding tables, by content: equal tables are stored once
    artefacts/ctr/counters.json, counters/   counts of earlier events, for all versions (`serving.counters`), or absent
    artefacts/ctr/versions/<utc>-<hash>/
        artefact.json                        `Description`: what it is, and {file: bytes, sha256} of all other files
        model.json, tower.safetensors, vocab/, items.safetensors, examples.json, expected.safetensors, statistics.json

A version is written aside and renamed: an export that dies leaves nothing to be seen. Nothing in an artefact is code:
JSON and safetensors only. What is read is bounded, inside the folder, no link, and of the size and hash written down.
Hashes find what rots, not forgery: whoever can write the folder can write its hashes.
"""

import collections.abc
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import time
import typing

from gpsd_dist.disk import reading, writing
from gpsd_dist.schema import Manifest, manifest_from_dict, nests_deeper
from gpsd_dist.validation import checked, json_safe

SCHEMA_VERSION = 1
CURRENT_NAME, DESCRIPTION_NAME = "current.json", "artefact.json"
VERSIONS, BLOBS = "versions", "blobs"
ENGINES = ("eager", "onnx")
DTYPES = ("fp32", "fp16", "int8")  # of tables
MAX_CANDIDATES = 1_000  # of a request; untuned
_PARTIAL = ".partial-"
_LOCK = ".lock"
_VERSION_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{12}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_JSON_BYTES = 2**26  # untuned: 64 examples of 10,000 events each
_MAX_NESTING = 32
_MAX_FILES = 100_000
_CHUNK_BYTES = 2**20
_MAX_SHOWN = 8
_MAX_TOLERANCE = 1e-2  # of a logit; exports write 1e-5


class ArtefactError(ValueError):
    """Raised for an artefact that is damaged, not one, or of another version; the message names the file."""


@dataclasses.dataclass(frozen=True)
class FileSum:
    """Size and hash that a file must have."""

    num_bytes: int
    sha256: str


@checked(is_finite=False)
class Description:
    """Content of `artefact.json`."""

    schema_version: int
    created: str
    """UTC"""
    source: dict[str, typing.Any]
    """Run, step, metrics, commit and data that it was made of."""
    packages: dict[str, str]
    manifest: dict[str, typing.Any]
    """Features, tables, tasks, history limit, as the run saw them; without files of data."""
    engine: str
    tolerance: float
    """Largest difference of a replayed logit, as a share of max(1, its size)."""
    limits: dict[str, int]
    tables: dict[str, dict[str, typing.Any]]
    """Looked-up table -> {"dtype", "num_rows", "width", "blobs": [sha256 of each part]}"""
    blobs: dict[str, int]
    """sha256 -> bytes"""
    files: dict[str, dict[str, typing.Any]]
    """Path in the folder of the version -> {"bytes", "sha256"}"""


@dataclasses.dataclass(frozen=True)
class Artefact:
    """One version that was opened: its description is whole, and all files are there with their sizes."""

    root: pathlib.Path
    version: str
    folder: pathlib.Path
    """That of the version."""
    description: Description
    manifest: Manifest

    def path(self, name: str) -> pathlib.Path:
        """Returns the path of a file of the version. ArtefactError if the description does not list it."""
        if name not in self.description.files:
            raise ArtefactError(f"{self.folder} has no {name}, which serving needs: export it again")
        return self.folder / name

    def read_json(self, name: str) -> dict[str, typing.Any]:
        """Reads a JSON file of the version."""
        return read_json(self.path(name))

    def sums(self) -> dict[pathlib.Path, FileSum]:
        """Maps every file of the version, blobs included, to what it must be."""
        files = {
            self.folder / name: FileSum(entry["bytes"], entry["sha256"])
            for name, entry in self.description.files.items()
        }
        blobs = {self.root / BLOBS / name: FileSum(size, name) for name, size in self.description.blobs.items()}
        return files | blobs

    def check_hashes(self) -> None:
        """Reads every file and compares its SHA-256. ArtefactError names those that are not what was written."""
        wrong = [path for path, expected in self.sums().items() if sum_of(path).sha256 != expected.sha256]
        if wrong:
            names = ", ".join(str(path.relative_to(self.root)) for path in wrong[:_MAX_SHOWN])
            raise ArtefactError(
                f"{self.root} is damaged: {names} is not what was written (its SHA-256 differs); export it again"
            )


def open_version(path: str | os.PathLike[str]) -> Artefact:
    """Opens the current version of an artefact, or the version whose folder is given. Reads JSON, no tensor.

    ArtefactError says which file is missing, broken, a link, or of another size.
    """
    folder = pathlib.Path(path).absolute()
    if folder.parent.name == VERSIONS:
        root, version, digest = folder.parent.parent, folder.name, None
    else:
        root = folder
        current = read_json(root / CURRENT_NAME)
        version, digest = current.get("version"), current.get("sha256")
        if not isinstance(digest, str) or not isinstance(version, str):
            raise ArtefactError(f"{root / CURRENT_NAME} has no version and sha256; point it at a version again")
    if not _VERSION_NAME.fullmatch(version):
        raise ArtefactError(f"{root} names the version {version[:80]!r}, expected UTC time and hash; export it again")
    place = root / VERSIONS / version / DESCRIPTION_NAME
    content = read_bytes(place)
    found = hashlib.sha256(content).hexdigest()
    if found != (digest or found) or not found.startswith(version.rsplit("-", 1)[1]):
        raise ArtefactError(f"{place} is not what was written (its SHA-256 differs); copy or export it again")
    description = _description(place, _decoded(place, content))
    try:
        manifest = manifest_from_dict(description.manifest)
    except ValueError as error:
        raise ArtefactError(f"{place}: manifest: {error}; export it again") from error
    artefact = Artefact(root, version, place.parent, description, manifest)
    _check_sizes(artefact)
    return artefact


def _description(place: pathlib.Path, raw: dict[str, typing.Any]) -> Description:
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise ArtefactError(
            f"{place} has schema version {raw.get('schema_version')!r}, this program reads {SCHEMA_VERSION}: export it "
            "again, or use the program that wrote it"
        )
    try:
        made = Description(**raw)
    except (TypeError, ValueError) as error:
        raise ArtefactError(f"{place} is no description of an artefact ({error}); export it again") from error
    problems = [] if made.engine in ENGINES else [f"engine {made.engine!r} is none of {ENGINES}"]
    if not 0 <= made.tolerance <= _MAX_TOLERANCE:
        problems.append(f"tolerance {made.tolerance}, expected 0 to {_MAX_TOLERANCE:g}")
    problems += [f"file {name!r}" for name in made.files if not _stays_inside(name)]
    problems += [f"entry of {name!r}" for name, entry in made.files.items() if not _is_sum(entry)]
    problems += [f"blob {name!r}" for name, size in made.blobs.items() if not _SHA256.fullmatch(name) or size < 0]
    problems += [f"table {name!r}" for name, entry in made.tables.items() if not _is_table(entry, made.blobs)]
    if len(made.files) + len(made.blobs) > _MAX_FILES:
        problems.append(f"more than {_MAX_FILES:,} files")
    if problems:
        shown = "; ".join(problem[:120] for problem in problems[:_MAX_SHOWN])
        raise ArtefactError(f"{place} is no description of an artefact: wrong are {shown}; export it again")
    return made


def _stays_inside(name: str) -> bool:
    path = pathlib.PurePosixPath(name)
    return (
        bool(path.parts)
        and name == str(path)
        and len(path.parts) <= 2
        and ".." not in path.parts
        and not path.is_absolute()
        and name.isprintable()
        and not set(name) & set("\\:")
    )


def _is_sum(entry: dict[str, typing.Any]) -> bool:
    size, digest = entry.get("bytes"), entry.get("sha256")
    return type(size) is int and size >= 0 and isinstance(digest, str) and bool(_SHA256.fullmatch(digest))


def _is_table(entry: dict[str, typing.Any], blobs: dict[str, int]) -> bool:
    sizes, parts = (entry.get("num_rows"), entry.get("width")), entry.get("blobs")
    return (
        all(type(size) is int and 0 < size < 2**48 for size in sizes)
        and isinstance(entry.get("dtype"), str)
        and isinstance(parts, list)
        and all(isinstance(part, str) and part in blobs for part in parts)
    )


def _check_sizes(artefact: Artefact) -> None:
    problems = []
    for path, expected in artefact.sums().items():
        try:
            found = _regular(artefact.root, path).st_size
            if found != expected.num_bytes:
                problems.append(f"{path.relative_to(artefact.root)} has {found:,} bytes, not {expected.num_bytes:,}")
        except OSError as error:
            reading.raise_if_passing(path, error)
            problems.append(f"{path.relative_to(artefact.root)}: {error.strerror or error}")
    if problems:
        raise ArtefactError(f"{artefact.root} is damaged: {'; '.join(problems[:_MAX_SHOWN])}; copy or export it again")


def _regular(root: pathlib.Path, path: pathlib.Path) -> os.stat_result:
    """Returns the status of a file; OSError if it, or a folder between it and `root`, is missing or a link."""
    for folder in path.relative_to(root).parents[:-1]:
        if not stat.S_ISDIR((root / folder).lstat().st_mode):
            raise OSError(f"{folder} is a link or no folder")
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("is a link or no file")
    return status


def read_bytes(path: pathlib.Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Reads a whole file that is no link. ArtefactError if it is missing, a link, or larger; OSError if it may pass."""

    def read() -> bytes:
        with os.fdopen(reading.open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return file.read(max_bytes + 1)

    try:
        content = reading.again(path, read)
    except reading.NotReadableNow:
        raise
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be read ({error.strerror or error}); expected an artefact of python -m gpsd_dist.export"
        ) from error
    if len(content) > max_bytes:
        raise ArtefactError(f"{path} has more than {max_bytes:,} bytes, which no such file of ours has")
    return content


def read_json(path: pathlib.Path) -> dict[str, typing.Any]:
    """Reads the JSON object in a file. ArtefactError for anything else."""
    return _decoded(path, read_bytes(path))


def _decoded(path: pathlib.Path, content: bytes) -> dict[str, typing.Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is no valid JSON ({type(error).__name__}: {error}); export it again") from error
    if not isinstance(value, dict) or nests_deeper(value, _MAX_NESTING):
        raise ArtefactError(f"{path} holds no JSON object of our depth; export it again")
    return value


def sum_of(path: pathlib.Path) -> FileSum:
    """Computes size and SHA-256 of a file. ArtefactError if it cannot be read; OSError if that may pass."""

    def read() -> FileSum:
        digest, size = hashlib.sha256(), 0
        with reading.open_read(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        return FileSum(size, digest.hexdigest())

    try:
        return reading.again(path, read)
    except reading.NotReadableNow:
        raise
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror or error}); copy or export it again") from error


class Draft:
    """A version that is being written: files go into `folder`, parts of tables into the blobs."""

    def __init__(self, root: pathlib.Path, folder: pathlib.Path):
        self.root, self.folder = root, folder
        self.blobs: dict[str, int] = {}
        self.new_blob_bytes = 0
        """Bytes of tables that were not there before."""

    def write_json(self, name: str, content: typing.Any) -> None:
        """Writes a JSON file, or writes it anew; NaN and infinities become null."""
        (self.folder / name).unlink(missing_ok=True)
        _write(self.folder / name, _encoded(content))

    def add_blob(self, write: collections.abc.Callable[[pathlib.Path], None]) -> str:
        """Lets `write` make a file, and keeps it under its SHA-256, which is returned; once, if it is there already."""
        aside = self.root / BLOBS / f"{_PARTIAL}{secrets.token_hex(8)}"
        write(aside)
        self._share(aside)
        writing.sync(aside)
        made = sum_of(aside)
        target = self.root / BLOBS / made.sha256
        if target.is_file() and sum_of(target) == made:
            aside.unlink()
            with contextlib.suppress(PermissionError):  # somebody else's
                self._share(target)
        else:
            aside.replace(target)
            self.new_blob_bytes += made.num_bytes
        self.blobs[made.sha256] = made.num_bytes
        return made.sha256

    def _share(self, path: pathlib.Path) -> None:
        """Lets the umask say who may read a file: safetensors makes its own for their owner alone."""
        path.chmod(self.folder.stat().st_mode & 0o666)

    def preview(self, **facts: typing.Any) -> Artefact:
        """Opens what is written so far. `facts`: the fields of `Description` that do not follow from the files."""
        files = {}
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            made = sum_of(path)
            files[path.relative_to(self.folder).as_posix()] = {"bytes": made.num_bytes, "sha256": made.sha256}
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        made_of: dict[str, typing.Any] = {"blobs": self.blobs, "files": files}
        description = Description(schema_version=SCHEMA_VERSION, created=created, **made_of, **json_safe(facts))
        return Artefact(self.root, "draft", self.folder, description, manifest_from_dict(description.manifest))

    def commit(self, **facts: typing.Any) -> str:
        """Writes the description, makes the version visible and returns its name. It is not current yet."""
        while True:
            description = self.preview(**facts).description
            content = _encoded(dataclasses.asdict(description))
            second = description.created.replace("-", "").replace(":", "")
            version = f"{second}-{hashlib.sha256(content).hexdigest()[:12]}"
            if not (self.root / VERSIONS / version).exists():
                break
            time.sleep(0.2)  # the same run was exported within this second
        for name in description.files:
            self._share(self.folder / name)
            writing.sync(self.folder / name)
        _write(self.folder / DESCRIPTION_NAME, content)
        for folder in (*(path for path in self.folder.rglob("*") if path.is_dir()), self.folder, self.root / BLOBS):
            writing.sync(folder)
        self.folder.rename(self.root / VERSIONS / version)
        writing.sync(self.root / VERSIONS)
        return version


@contextlib.contextmanager
def drafting(root: str | os.PathLike[str]) -> collections.abc.Iterator[Draft]:
    """Makes the folder of an artefact if need be, deletes what dead exports left, and gives a draft to write into.

    One export at a time: OSError if another one is under way, or if the folder holds something else. Without `commit`
    nothing remains.
    """
    root = pathlib.Path(root).absolute()
    if root.exists() and not root.is_dir():
        raise OSError(f"{root} is a file, expected the folder of an artefact, or a new name")
    if root.is_dir() and any(root.iterdir()) and not any((root / name).exists() for name in (_LOCK, CURRENT_NAME)):
        raise OSError(f"{root} holds files and is no artefact, whose unused blobs would be deleted: name a new folder")
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        for folder in (root / VERSIONS, root / BLOBS):
            folder.mkdir(exist_ok=True)
        _delete_partial(root)
        try:
            draft = Draft(root, root / f"{_PARTIAL}{secrets.token_hex(8)}")
            draft.folder.mkdir()
            yield draft
        finally:
            _delete_partial(root)


@contextlib.contextmanager
def locked(root: pathlib.Path) -> collections.abc.Iterator[None]:
    """Lets one process at a time write to an artefact. OSError if another one does."""
    lock = reading.open_regular(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"another export is writing to {root}, or counters are; wait until it has ended") from error
        yield
    finally:
        os.close(lock)


def _delete_partial(root: pathlib.Path) -> None:
    """Deletes unfinished files, and blobs that no version uses. The caller has the lock."""
    writing.remove_leftovers(root)
    for path in [*root.glob(f"{_PARTIAL}*"), *(root / BLOBS).glob(f"{_PARTIAL}*")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    used: set[str] = set()
    for place in (root / VERSIONS).glob(f"*/{DESCRIPTION_NAME}"):
        try:
            used |= set(read_json(place)["blobs"])
        except (ArtefactError, KeyError, TypeError):
            return  # a damaged version may be mended from a copy; its blobs must be there then
    for blob in (root / BLOBS).iterdir():
        if blob.name not in used:
            blob.unlink()


def make_current(root: str | os.PathLike[str], version: str) -> None:
    """Lets `current.json` name this version, in one step: a reader sees the old one or the new one.

    ArtefactError if the version cannot be opened, or is a path instead of a name.
    """
    root = pathlib.Path(root).absolute()
    if not _VERSION_NAME.fullmatch(version):
        raise ArtefactError(f"{version[:200]!r} is no name of a version; expected one of those in {root / VERSIONS}")
    artefact = open_version(root / VERSIONS / version)
    digest = sum_of(artefact.folder / DESCRIPTION_NAME).sha256
    writing.write(root / CURRENT_NAME, _encoded({"version": version, "sha256": digest}))


def _encoded(content: typing.Any) -> bytes:
    return (json.dumps(json_safe(content), indent=1) + "\n").encode()


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that must not be there yet, and syncs it."""
    with os.fdopen(writing.create(path), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
