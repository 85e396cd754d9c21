"""Hostile checkpoints: whatever stands in their files, they are read or refused with one error, and run nothing."""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import math
import pathlib
import pickle
import shutil
import sys
import tempfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import strategies as st

from gpsd_dist.checkpoint import files, integrity, loading, manager, pickled_index, retention, state, storage
from gpsd_dist.checkpoint.__main__ import main
from gpsd_dist.config import RunConfig
from tests.fuzz.properties import assert_one_error_line, clean_or_one_error, fuzz
from tests.helpers.synthetic import make_manifest

SHAPE = (5, 3)
NAMES = (".metadata", "__0_0.distcp", "index.json", "run_state.json", "checksums.json", "../best.json")
NUMBERS = [None, True, False, -1, 0, 10**15, 10**400, -(10**400), 1e308, math.nan, math.inf]
TEXTS = ["", "x", "../../x", "/etc/passwd", "\0", "a\nb", "\ud800", "{}"]
CONTAINERS = [[], {}, [[]], {"": {}}, [None] * 3, ["../x"], {"sha256": 1}]
HOSTILE = st.sampled_from([*NUMBERS, *TEXTS, *CONTAINERS]) | st.integers(0, 60).map(
    lambda depth: functools.reduce(lambda inner, _: [inner], range(depth), [])
)
FLIPS = st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), max_size=4)
CHANGES = st.lists(st.tuples(st.integers(0, 500), HOSTILE), min_size=1, max_size=3)


@functools.cache
def _kept_until_exit() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fuzz_checkpoints_")


@functools.cache
def _whole() -> pathlib.Path:
    """A run folder with one sound checkpoint of step 7."""
    root = pathlib.Path(_kept_until_exit().name)
    folder = root / "checkpoints/step_00000007"
    writer = files.Writer(folder)
    tensors = {"table": {"item": torch.ones(SHAPE)}, "dense": {"w": torch.zeros(2)}}
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    run = RunConfig("pretrain", "data", "out")
    order = {"rows": 46, "global_batch": 8, "batch_by": "rows", "split": "pretrain"}
    saved = manager.RunState(
        step=7,
        data_position={"epoch": 1, "step": 1, "order": order},
        progress={"best_value": 0.5, "best_step": 7, "stale": 0, "is_finished": True},
        metrics={"click/auc": 0.5},
        run_config=dataclasses.asdict(run),
        manifest=dataclasses.asdict(make_manifest()),
        world_size=1,
    )
    content = json.dumps(dataclasses.asdict(saved)).encode()
    sums = integrity.Checksums(1e9, writer.written | {"run_state.json": integrity.sum_of(content)})
    (folder / "checksums.json").write_bytes(sums.to_json())
    (folder / "run_state.json").write_bytes(content)
    retention.write_best(root / "checkpoints")
    return root


@contextlib.contextmanager
def _copy():
    """(run folder, checkpoint folder); a file beside them is the same afterwards."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as place:
        root = pathlib.Path(place) / "run"
        shutil.copytree(_whole(), root)
        canary = pathlib.Path(place) / "canary"
        canary.write_bytes(b"untouched")
        yield root, root / "checkpoints/step_00000007"
        assert sorted(path.name for path in pathlib.Path(place).iterdir()) == ["canary", "run"]
        assert canary.read_bytes() == b"untouched"


def _read_all(root: pathlib.Path, checkpoint: pathlib.Path) -> None:
    """Everything that the program does with a checkpoint, each part on its own."""
    tensors = {"table": {"item": torch.full(SHAPE, 9.0)}, "dense": {"w": torch.full((2,), 9.0)}}
    for work in (
        lambda: manager.find(root),
        lambda: manager.best_step(root / "checkpoints"),
        lambda: manager.newest_intact(root / "checkpoints"),
        lambda: loading.saved_sizes(checkpoint),
        lambda: integrity.saved_at_s(checkpoint),
        lambda: state.read_run(checkpoint),
        lambda: retention.removable(root / "checkpoints", 1, 1.0),
        lambda: retention.write_best(root / "checkpoints"),
        lambda: loading.load_tensors(checkpoint, tensors),
        lambda: loading.fill_tensors(checkpoint, tensors),
    ):
        with clean_or_one_error():
            work()
    for command in ("list", "verify"):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([command, str(root)])
        assert status in (0, 1) or assert_one_error_line(status, err.getvalue()) is None


def _place(document: object, number: int) -> tuple[object, object]:
    """(container, key) of the `number`-th value in a JSON document, counted round."""
    places: list[tuple[object, object]] = []
    todo = [document]
    while todo:
        entry = todo.pop()
        keys = list(entry) if isinstance(entry, dict) else range(len(entry)) if isinstance(entry, list) else ()
        places += [(entry, key) for key in keys]
        todo += [entry[key] for key in keys]
    return places[number % len(places)]


@fuzz(40, name=st.sampled_from(NAMES[:-1]), flips=FLIPS, cut=st.none() | st.integers(0, 2**20), is_hashed=st.booleans())
def test_flipped_and_cut_bytes(name, flips, cut, is_hashed):
    """Changes any file; `is_hashed`: whoever changed it also wrote its checksum."""
    with _copy() as (root, checkpoint):
        content = bytearray((checkpoint / name).read_bytes())
        for place, mask in flips:
            content[place % len(content)] ^= mask
        content = content[: cut % len(content)] if cut is not None else content
        (checkpoint / name).write_bytes(content)
        if is_hashed and name != "checksums.json":
            _hash_again(checkpoint, name)
        _read_all(root, checkpoint)


def _hash_again(checkpoint: pathlib.Path, name: str) -> None:
    """Writes the checksum that fits a changed file."""
    sums = integrity.read_checksums(checkpoint)
    changed = sums.files | {name: integrity.sum_of((checkpoint / name).read_bytes())}
    (checkpoint / "checksums.json").write_bytes(dataclasses.replace(sums, files=changed).to_json())


def _drop_json_index(checkpoint: pathlib.Path) -> None:
    """Makes a checkpoint look as before `index.json`, to whoever has not its checksums in mind."""
    (checkpoint / "index.json").unlink()
    sums = integrity.read_checksums(checkpoint)
    left = {name: entry for name, entry in sums.files.items() if name != "index.json"}
    (checkpoint / "checksums.json").write_bytes(dataclasses.replace(sums, files=left).to_json())


@fuzz(100, name=st.sampled_from(NAMES[2:]), changes=CHANGES, is_hashed=st.booleans())
def test_hostile_json(name, changes, is_hashed):
    """Puts a value where it does not belong in `index.json`, `run_state.json`, `checksums.json` or `best.json`."""
    with _copy() as (root, checkpoint):
        document = json.loads((checkpoint / name).read_text())
        for number, value in changes:
            container, key = _place(document, number)
            container[key] = copy.deepcopy(value)
        (checkpoint / name).write_text(json.dumps(document))
        if is_hashed and name in ("index.json", "run_state.json"):
            _hash_again(checkpoint, name)
        opened = _opened(lambda: _read_all(root, checkpoint))
        assert not [entry for entry in opened if "canary" in entry or "passwd" in entry]


@pytest.mark.parametrize(
    "name", ["../canary", "../../../canary", "/etc/passwd", "a/b", "", ".", "..", "x\0", "x" * 300]
)
def test_checksums_of_files_outside_the_folder(name):
    """Nothing is opened there: the name alone is refused."""
    with _copy() as (root, checkpoint):
        path = checkpoint / "checksums.json"
        document = json.loads(path.read_text())
        document["files"][name] = {"sha256": "0" * 64, "num_bytes": 9}
        path.write_text(json.dumps(document))
        opened = _opened(lambda: _read_all(root, checkpoint))
        assert not [entry for entry in opened if "canary" in entry or "passwd" in entry]
        with pytest.raises(
            integrity.DamagedCheckpoint, match=r"checksums.json is damaged \(it names '.*which is no file"
        ):
            integrity.check(checkpoint)


_watched: list[list[str]] = []


def _hook(event: str, arguments: tuple) -> None:
    if event == "open" and _watched:
        _watched[-1].append(str(arguments[0]))


sys.addaudithook(_hook)


def _opened(work) -> list[str]:
    """Names of the files that Python opens meanwhile."""
    _watched.append([])
    try:
        work()
    finally:
        names = _watched.pop()
    return names


ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.text(max_size=5)
    | st.sampled_from(["../canary", "__0_0.distcp", "item", torch.Size([5, 3]), torch.Size([2**40]), torch.float32])
)


def _objects(root: object) -> list[object]:
    """Objects with attributes in an index, each once, in a fixed order."""
    found, todo, seen = [], [root], set()
    while todo:
        entry = todo.pop()
        if id(entry) in seen:
            continue
        seen.add(id(entry))
        if dataclasses.is_dataclass(entry):
            found.append(entry)
            todo += [getattr(entry, field.name) for field in dataclasses.fields(entry)]
        elif isinstance(entry, dict):
            todo += [*entry, *entry.values()]
        elif isinstance(entry, list):
            todo += entry
    return found


FIELDS = st.tuples(st.integers(0, 60), st.integers(0, 5), ATOMS | st.lists(ATOMS, max_size=2))


@fuzz(60, changes=st.lists(FIELDS, min_size=1, max_size=3))
def test_hostile_pickled_index(changes):
    """Changes attributes of the objects in `.metadata` of an old checkpoint; its checksum fits."""
    with _copy() as (root, checkpoint):
        _drop_json_index(checkpoint)
        path = checkpoint / ".metadata"
        index = pickle.loads(path.read_bytes())
        for number, field, value in changes:
            objects = _objects(index)
            made = objects[number % len(objects)]
            names = [field.name for field in dataclasses.fields(made)]
            object.__setattr__(made, names[field % len(names)], value)
        with contextlib.suppress(Exception):  # not everything can be pickled
            path.write_bytes(pickle.dumps(index))
        _hash_again(checkpoint, ".metadata")
        opened = _opened(lambda: _read_all(root, checkpoint))
        assert not [name for name in opened if "canary" in name]


OPCODES = [bytes([code]) for code in b"(})]0N\x85\x86\x87\x88\x89\x94R\x81b.ust\x93K\x01C\x02"]
OPERANDS = [b"ctorch\nSize\n", b"cos\nsystem\n", b"X\x02\x00\x00\x00ab", b"r\xff\xff\xff\xff", b"j\x00\x00\x00\x00"]
OPERATIONS = st.lists(st.sampled_from([*OPCODES, *OPERANDS]), max_size=30).map(b"".join)


@fuzz(300, content=st.binary(max_size=60) | OPERATIONS)
def test_any_pickle(content):
    """Any bytes give plain data or a ValueError."""
    try:
        assert isinstance(pickled_index.read_pickled(b"\x80\x04" + content), dict)
    except ValueError as error:
        assert str(error)


def test_every_attack_that_a_pickle_can_do_is_refused_by_the_commands(tmp_path, capsys):
    """`diff` reads the index of both."""
    shutil.copytree(_whole(), tmp_path / "run")
    checkpoint, proof = tmp_path / "run/checkpoints/step_00000007", tmp_path / "proof"

    class Attack:
        def __reduce__(self):
            return exec, (f"open({str(proof)!r}, 'w')",)

    content = pickle.dumps(Attack())
    _drop_json_index(checkpoint)
    (checkpoint / ".metadata").write_bytes(content)
    _hash_again(checkpoint, ".metadata")
    status = main(["diff", str(tmp_path / "run"), str(_whole())])
    assert_one_error_line(status, capsys.readouterr().err)
    assert not proof.exists()


def test_a_link_in_place_of_a_checkpoint_is_removed_and_not_what_it_leads_to(tmp_path):
    shutil.copytree(_whole(), tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(_whole() / "checkpoints/step_00000007", elsewhere)
    link = tmp_path / "run/checkpoints/step_00000003"
    link.symlink_to(elsewhere)
    assert main(["prune", str(tmp_path / "run"), "--keep_last", "1"]) == 0
    assert not link.exists() and len(list(elsewhere.iterdir())) == 5


@pytest.mark.parametrize("name", ["run_state.json", "checksums.json", "index.json", ".metadata"])
def test_a_file_that_is_too_large_is_refused_unread(tmp_path, name):
    shutil.copytree(_whole(), tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step_00000007"
    if name == ".metadata":
        _drop_json_index(checkpoint)
    with open(checkpoint / name, "wb") as file:
        file.truncate(2**40)  # takes no place on the disk
    read, limit = {
        "run_state.json": (manager.read_state, storage.MAX_JSON_BYTES),
        "checksums.json": (integrity.read_checksums, storage.MAX_JSON_BYTES),
    }.get(name, (loading.saved_keys, 2**28))
    with clean_or_one_error() as errors:
        read(checkpoint)
    assert f"has more than {limit:,} bytes" in str(errors[0])
