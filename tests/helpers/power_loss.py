"""What a loss of power may leave of the files that a piece of work writes: unsynced writes dropped, and out of order.

`recorded` watches a folder. Before every change of a name (make, rename, link, remove) and every sync it notes the
tree, what of each file was synced, and what of each folder. From a moment, `states` makes folders that a disk may hold
then: the content of a file is that of its last sync (nothing, if there was none), or what was written since, or half of
that; the names in a folder are those of its last sync or of any later moment. All are chosen independently.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import stat
import sys
import threading

_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "open")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclasses.dataclass
class Moment:
    """Inode -> names in a folder (current, synced), and inode -> content of a file (current, synced)."""

    operation: str
    names: dict[int, dict[str, int]]
    synced_names: dict[int, dict[str, int]]
    content: dict[int, bytes]
    synced_content: dict[int, bytes]


class Recording:
    def __init__(self, root: pathlib.Path):
        self.root, self.moments = root, []
        self._held: dict[int, int] = {}  # an open descriptor each, so that no inode is given out twice
        self._lock = threading.RLock()
        self._synced_names, self._synced_content = {}, {}
        names, content = self._look()
        self._synced_names, self._synced_content = dict(names), dict(content)
        self.root_inode = root.stat().st_ino

    def note(self, operation: str) -> None:
        with self._lock:
            names, content = self._look()
            self.moments.append(Moment(operation, names, dict(self._synced_names), content, dict(self._synced_content)))

    def synced(self, descriptor: int) -> None:
        with self._lock:
            inode, (names, _) = os.fstat(descriptor).st_ino, self._look()
            if inode in names:
                self._synced_names[inode] = names[inode]
            elif inode in self._held:
                self._synced_content[inode] = pathlib.Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _look(self):
        names: dict[int, dict[str, int]] = {}
        content: dict[int, bytes] = {}
        for folder, _, _ in os.walk(self.root):
            entries = names.setdefault(os.stat(folder).st_ino, {})
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    inode = entry.inode()
                    entries[entry.name] = inode
                    if inode not in self._held:
                        self._held[inode] = os.open(entry.path, os.O_RDONLY)
                    if entry.is_file():
                        content[inode] = pathlib.Path(entry.path).read_bytes()
        return names, content

    def close(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)


_recordings: list[Recording] = []  # at most one: hooks cannot be taken away again
_hooks: list = []
_inside = threading.local()


def _hook(event: str, details: tuple) -> None:
    if not _recordings or event not in _CHANGES or getattr(_inside, "now", False):
        return
    recording = _recordings[0]
    is_write = event != "open" or (isinstance(details[2], int) and bool(details[2] & _WRITING))
    if is_write and (str(details[0]).startswith(str(recording.root)) or event in ("os.remove", "os.rmdir")):
        _inside.now = True
        try:
            recording.note(f"{event} {os.path.basename(str(details[0]))}")
        finally:
            _inside.now = False


@contextlib.contextmanager
def recorded(root: pathlib.Path, monkeypatch):
    """Gives the recording of what the block does below `root`. What is there before is on the disk."""
    if not _hooks:
        _hooks.append(_hook)
        sys.addaudithook(_hook)
    recording, fsync = Recording(root), os.fsync

    def watched_fsync(descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        fsync(number)
        _inside.now = True
        try:
            recording.note("fsync")
            recording.synced(number)
        finally:
            _inside.now = False

    monkeypatch.setattr(os, "fsync", watched_fsync)
    _recordings.append(recording)
    try:
        yield recording
        recording.note("the end")
    finally:
        _recordings.clear()
        monkeypatch.setattr(os, "fsync", fsync)
        recording.close()


def states(recording: Recording, index: int, seeds: range):
    """Makes (description, choose) of what the disk may hold after a loss at a moment: extremes and mixtures."""
    moment = recording.moments[index]
    history = [past.names for past in recording.moments[: index + 1]]

    def since_sync(inode: int) -> list[dict[str, int]]:
        synced = moment.synced_names.get(inode, {})
        versions = [names.get(inode, {}) for names in history]
        begin = max((i for i, version in enumerate(versions) if version == synced), default=0)
        return versions[begin:] or [synced]

    def build(folder: pathlib.Path, inode: int, names_of, content_of) -> None:
        folder.mkdir()
        for name, child in names_of(inode).items():
            if child in moment.names or child in moment.synced_names or any(child in past for past in history):
                build(folder / name, child, names_of, content_of)
            else:
                (folder / name).write_bytes(content_of(child))

    def synced_names(inode):
        return moment.synced_names.get(inode, {})

    def current_names(inode):
        return moment.names.get(inode, synced_names(inode))

    def synced_content(inode):
        return moment.synced_content.get(inode, b"")

    yield "nothing unsynced", lambda folder: build(folder, recording.root_inode, synced_names, synced_content)
    yield "names without content", lambda folder: build(folder, recording.root_inode, current_names, synced_content)
    for seed in seeds:

        def mixed(folder, seed=seed):
            choose = random.Random(f"{index} {seed}")
            names = {}

            def some_names(inode):
                return names.setdefault(inode, choose.choice(since_sync(inode)))

            def some_content(inode):
                synced = synced_content(inode)
                current = moment.content.get(inode, synced)
                kept = len(synced) if current.startswith(synced) else 0  # what is appended takes nothing away
                return choose.choice([synced, current, current[: kept + (len(current) - kept) // 2]])

            def content(inode):  # what was synced and not written since is there
                current = moment.content.get(inode)
                return (
                    current
                    if current == moment.synced_content.get(inode) and current is not None
                    else some_content(inode)
                )

            build(folder, recording.root_inode, some_names, content)

        yield f"mixture {seed}", mixed


def check(recording: Recording, place: pathlib.Path, look, *, seeds: range = range(3), every: int = 1) -> list:
    """Lets `look` judge every state of every moment; returns what it answered."""
    found = []
    for index in range(0, len(recording.moments), every):
        for name, make in states(recording, index, seeds):
            make(place)
            try:
                found.append(look(place))
            except BaseException as error:
                error.add_note(f"power lost before '{recording.moments[index].operation}' ({index}), {name}")
                raise
            finally:
                for path in place.rglob("*"):
                    path.chmod(path.stat().st_mode | stat.S_IWUSR)
                shutil.rmtree(place)
    return found
