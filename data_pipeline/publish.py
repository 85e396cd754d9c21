"""Adds a version to a data folder, whose layout `data_versions` describes: nothing that a reader may read changes.

A build holds `OUT/.build.lock`, writes into `OUT/versions/.building`, renames that folder to its name and then replaces
`OUT/current.json`. A kill before the last of these steps leaves the previous version current; the next build removes
what was left behind, because whoever holds the lock knows that no other build lives. After publishing, old versions are
deleted, unless they are among the newest or in use.
"""

import collections.abc
import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import shutil
import signal
import threading
import typing

from data_pipeline import progress
from gpsd_dist import schema
from gpsd_dist.data import data_versions
from gpsd_dist.data.data_versions import CURRENT_NAME, IN_USE, NAME, ROOT, VERSIONS, folder_of, published
from gpsd_dist.disk.reading import open_regular, raise_if_passing
from gpsd_dist.disk.writing import remove_leftovers, sync, write_json

LOCK_NAME = ".build.lock"
BUILDING, REMOVING = ".building", ".removing-"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(out_dir: pathlib.Path) -> typing.Iterator[None]:
    """Holds `out_dir` for one build, and first removes what a build that died left there.

    ValueError if another build holds it, if nothing can be written there, or if it holds something that is no data set.
    """
    _check_target(out_dir)
    path = out_dir / LOCK_NAME
    try:
        _move_back(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        raise_if_passing(out_dir, error)
        raise ValueError(
            f"--out_dir {out_dir}: nothing can be written there ({error.strerror or error}); choose another folder"
        ) from error
    try:
        _take(lock, path, out_dir)
        try:
            _remove_leftovers(out_dir)
            yield
        finally:
            path.unlink(missing_ok=True)
            for folder in (out_dir / VERSIONS, out_dir):  # a first build that failed leaves nothing
                with contextlib.suppress(OSError):
                    folder.rmdir()
    finally:
        os.close(lock)


def _check_target(out_dir: pathlib.Path) -> None:
    """Raises ValueError if `out_dir` holds something that is no data set, or lies in a version, whose files stay."""
    around = next((path for path in (out_dir, *out_dir.parents) if data_versions.root_of(path) != path), None)
    if around is not None:
        raise ValueError(
            f"--out_dir {out_dir} is (in) a version of the data set {data_versions.root_of(around)}, and versions are "
            "never written to; give the folder of the data set, or one elsewhere"
        )
    if not out_dir.exists():
        return
    names = [path.name for path in out_dir.iterdir() if not path.name.startswith(".")] if out_dir.is_dir() else ["."]
    is_data_set = bool({schema.MANIFEST_NAME, CURRENT_NAME} & set(names))
    foreign = [path for path in (out_dir / VERSIONS).glob("[!.]*") if not _is_version(path)]
    if not is_data_set and (foreign or set(names) - {VERSIONS, IN_USE, "lost+found"}):
        raise ValueError(
            f"--out_dir {out_dir} exists and is not a data set (no {CURRENT_NAME}, no {schema.MANIFEST_NAME}); choose "
            "another or remove it"
        )


def _move_back(out_dir: pathlib.Path) -> None:
    """Moves a data set back that a build older than versions had moved aside when it was killed."""
    for path in sorted(out_dir.parent.iterdir()) if out_dir.parent.is_dir() and not out_dir.exists() else ():
        if path.name.startswith(f".{out_dir.name}.old-") and (path / schema.MANIFEST_NAME).is_file():
            path.rename(out_dir)
            progress.warn(f"{out_dir} was moved away by a build that died, and is moved back from {path.name}")
            return


def _take(lock: int, path: pathlib.Path, out_dir: pathlib.Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_current = path.exists() and os.path.samestat(path.stat(), os.fstat(lock))
    except BlockingIOError:
        is_current = False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        progress.warn(f"{path}: this file system has no locks ({error.strerror}); nothing stops a second build here")
        is_current = True
    if not is_current:  # or the build that held it has just removed it
        raise ValueError(f"another build is at work on {out_dir} (it holds {path}); wait for its end")


def _is_version(path: pathlib.Path) -> bool:
    """Tells whether a folder of `versions/` is one: it has a manifest, which a build writes before it names it."""
    return NAME.fullmatch(path.name) is not None and (path / schema.MANIFEST_NAME).is_file()


def _remove_leftovers(out_dir: pathlib.Path) -> None:
    """Removes what builds left that died: half a version, one that was never published, one that was being deleted."""
    now_s = _server_time_s(out_dir)
    _, names = published(out_dir)
    whole = sorted(path.name for path in (out_dir / VERSIONS).glob("*") if _is_version(path))
    if whole and not names:  # each of them was checked before it got its name, so the newest counts
        names = (*[ROOT] * (out_dir / schema.MANIFEST_NAME).is_file(), *whole)
        write_json(out_dir / CURRENT_NAME, {"version": names[-1], "published": names})
        progress.warn(f"{out_dir / CURRENT_NAME} was missing; version {names[-1]} is the current one")
    remove_leftovers(out_dir)
    building = out_dir / VERSIONS / BUILDING
    if building.is_symlink() or building.is_file():
        building.unlink()
    found = [building, *(out_dir / VERSIONS).glob(f"{REMOVING}*")]
    found += [out_dir / VERSIONS / name for name in whole if name not in names]
    for path in found:
        # A version that is in no list any more may have a reader: one that resumes a run which began with it.
        if path.is_dir() and not data_versions.users(out_dir, path.name.removeprefix(REMOVING), now_s):
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            if _delete(out_dir, path):
                progress.say(f"removed {path}, {size / 1e6:.1f} MB that a build left when it died")
    if (out_dir / f"{REMOVING}{ROOT}").exists():
        _delete_root(out_dir)


def _server_time_s(out_dir: pathlib.Path) -> float:
    """Tells the time by the clock of the machine that holds the files."""
    os.utime(out_dir / LOCK_NAME)
    return (out_dir / LOCK_NAME).stat().st_mtime


@contextlib.contextmanager
def version(
    out_dir: pathlib.Path, keep_versions: int, refuse: typing.Callable[[], None] = lambda: None
) -> typing.Iterator[pathlib.Path]:
    """Gives an empty folder that becomes the current version when the block ends well, and is removed otherwise.

    The folder is on disk before anybody can see it, `manifest.json` in it included. `refuse` may raise at the last
    moment before that. Needs `locked`.
    """
    aside = out_dir / VERSIONS / BUILDING
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        with _undisturbed():
            refuse()
            _publish(out_dir, aside, keep_versions)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _undisturbed() -> typing.Iterator[None]:
    """Ignores SIGTERM and Ctrl-C while a version is made current: ended there, a build could not say which holds."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT) if is_main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _publish(out_dir: pathlib.Path, aside: pathlib.Path, keep_versions: int) -> None:
    _, names = published(out_dir)
    if not names and (out_dir / schema.MANIFEST_NAME).is_file():
        names = (ROOT,)
    on_disk = [path.name for path in (out_dir / VERSIONS).glob("*") if NAME.fullmatch(path.name)]
    number = 1 + max([int(name.partition("-")[0]) for name in (*names, *on_disk) if name != ROOT], default=0)
    digest = hashlib.sha256((aside / schema.MANIFEST_NAME).read_bytes()).hexdigest()[:8]
    target = out_dir / VERSIONS / f"{number:04d}-{digest}"
    aside.rename(target)
    sync(target.parent)
    names = (*names, target.name)
    old = names[:-keep_versions]
    now_s = _server_time_s(out_dir)
    in_use = {name: found for name in old if (found := data_versions.users(out_dir, name, now_s))}
    try:
        kept = [name for name in names if name not in old or name in in_use]
        write_json(out_dir / CURRENT_NAME, {"version": target.name, "published": kept})
    except BaseException:
        target.rename(aside)  # nobody has seen it; it is removed like every other failure
        raise
    for name, found in in_use.items():
        progress.say(f"  version {name} stays: in use by {', '.join(found[:3])}")
    for name in (name for name in old if name not in in_use):
        with contextlib.suppress(OSError):  # the new version is safe; the next build tries again
            if _delete_root(out_dir) if name == ROOT else _delete(out_dir, folder_of(out_dir, name)):
                progress.say(f"  version {name} deleted: {keep_versions} stay (--keep_versions)")


def _delete(out_dir: pathlib.Path, folder: pathlib.Path) -> bool:
    """Deletes a version, unless it has a reader: it is gone at once for those who look for one, and its files follow.

    A reader marks a version and then looks whether it is still there. So the marks count once nobody finds it any more:
    whoever is not seen then finds it gone.
    """
    name = folder.name.removeprefix(REMOVING)
    away = folder.with_name(f"{REMOVING}{name}")
    if folder != away:
        folder.rename(away)
    if data_versions.users(out_dir, name, _server_time_s(out_dir)):
        away.rename(away.with_name(name))
        return False
    shutil.rmtree(away)
    return True


def _delete_root(out_dir: pathlib.Path) -> bool:
    """Deletes a data set older than versions, like `_delete`: its manifest first, then the files that it names."""
    away, manifest_path = out_dir / f"{REMOVING}{ROOT}", out_dir / schema.MANIFEST_NAME
    away.mkdir(exist_ok=True)
    if manifest_path.is_file():
        manifest_path.rename(away / schema.MANIFEST_NAME)
    if (away / schema.MANIFEST_NAME).is_file():
        if data_versions.users(out_dir, ROOT, _server_time_s(out_dir)):
            (away / schema.MANIFEST_NAME).rename(manifest_path)
            away.rmdir()
            return False
        manifest = schema.read_manifest(away)
        named = [out_dir / file for split in manifest.splits for file in split.files]
        named += [out_dir / "vocab" / f"{table.name}.parquet" for table in manifest.tables]
        for path in [*named, out_dir / "items.parquet"]:
            path.unlink(missing_ok=True)
        shutil.rmtree(out_dir / ".decoded", ignore_errors=True)  # `data.decoded_cache` of this version
        for folder in {path.parent for path in named} - {out_dir}:
            with contextlib.suppress(OSError):  # it holds a file of somebody else
                folder.rmdir()
    shutil.rmtree(away)
    return True


def link(files: collections.abc.Iterable[str], from_dir: pathlib.Path, root: pathlib.Path) -> None:
    """Puts files of another version into `root` under the same names: hard links, or copies without these."""
    for name in files:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(from_dir / name, target)
        except OSError:
            shutil.copy2(from_dir / name, target)
