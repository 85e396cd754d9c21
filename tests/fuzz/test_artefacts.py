"""Hostile artefacts: whatever stands in their files, they are served or refused with one error."""

import contextlib
import copy
import functools
import hashlib
import json
import pathlib
import shutil
import tempfile

from hypothesis import strategies as st

from gpsd_dist.serving.artefact import ArtefactError, open_version
from gpsd_dist.serving.scorer import load
from tests.fuzz.properties import clean_or_one_error, fuzz
from tests.fuzz.test_checkpoints import CHANGES, FLIPS, _place
from tests.helpers.artefacts import write_artefact

JSON_NAMES = ("model.json", "statistics.json", "examples.json", "artefact.json")
NAMES = (
    *JSON_NAMES,
    *("tower.safetensors", "items.safetensors", "expected.safetensors"),
    *("vocab/item.index.safetensors", "vocab/tag.index.safetensors", "blob"),
)


@functools.cache
def _kept_until_exit() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fuzz_artefacts_")


@functools.cache
def _whole() -> pathlib.Path:
    root = pathlib.Path(_kept_until_exit().name)
    write_artefact(root / "ctr", root / "data")
    return root / "ctr"


@contextlib.contextmanager
def _copy():
    """(artefact, folder of its version); what is beside it is the same afterwards."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as place:
        root = pathlib.Path(place) / "ctr"
        shutil.copytree(_whole(), root)
        yield root, open_version(root).folder
        assert [path.name for path in pathlib.Path(place).iterdir()] == ["ctr"]


def _path(folder: pathlib.Path, name: str) -> pathlib.Path:
    return next(iter((folder.parents[1] / "blobs").iterdir())) if name == "blob" else folder / name


def _forge(root: pathlib.Path, folder: pathlib.Path, description: bytes | None = None) -> None:
    """Makes sizes and hashes those of the files as they are, so that only reading can find what is wrong."""
    path = folder / "artefact.json"
    if description is None:
        raw = json.loads(path.read_bytes())
        for name, entry in raw["files"].items():
            content = (folder / name).read_bytes()
            entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        renamed = {}
        for blob in list((root / "blobs").iterdir()):
            renamed[blob.name] = hashlib.sha256(blob.read_bytes()).hexdigest()
            blob.rename(blob.with_name(renamed[blob.name]))
        raw["blobs"] = {name: (root / "blobs" / name).stat().st_size for name in renamed.values()}
        for table in raw["tables"].values():
            table["blobs"] = [renamed[name] for name in table["blobs"]]
        description = json.dumps(raw).encode()
    path.write_bytes(description)
    digest = hashlib.sha256(description).hexdigest()
    version = folder.name.rsplit("-", 1)[0] + "-" + digest[:12]
    folder.rename(folder.with_name(version))
    (root / "current.json").write_text(json.dumps({"version": version, "sha256": digest}))


def _serve(root: pathlib.Path) -> bool:
    """Everything a server does with an artefact. Says whether it is served."""
    requests = json.loads((open_version(_whole()).folder / "examples.json").read_bytes())["requests"][:4]
    served = False
    for verify in (True, False):
        with clean_or_one_error() as errors:
            scorer = load(root, verify=verify)
            scorer.reference.items()
            for answer in scorer.score(requests):
                assert len(answer.tasks["click"]["logit"]) > 0
        served = served or (verify and not errors)
    return served


def test_the_whole_one_is_served():
    with _copy() as (root, folder):
        _forge(root, folder)
        assert _serve(root)


@fuzz(15, name=st.sampled_from(NAMES), flips=FLIPS, cut=st.none() | st.integers(0, 2**20), is_forged=st.booleans())
def test_flipped_and_cut_bytes(name, flips, cut, is_forged):
    with _copy() as (root, folder):
        path = _path(folder, name)
        content = bytearray(path.read_bytes())
        before = bytes(content)
        for place, mask in flips:
            content[place % len(content)] ^= mask
        del content[len(content) if cut is None else cut % len(content) :]
        path.write_bytes(content)
        if is_forged and name != "artefact.json":
            _forge(root, folder)
        served = _serve(root)
        assert not served or is_forged or bytes(content) == before


@fuzz(25, name=st.sampled_from(JSON_NAMES), changes=CHANGES)
def test_hostile_json(name, changes):
    with _copy() as (root, folder):
        document = json.loads((folder / name).read_bytes())
        for number, value in changes:
            container, key = _place(document, number)
            container[key] = copy.deepcopy(value)
        content = json.dumps(document).encode()
        (folder / name).write_bytes(content)
        _forge(root, folder, content if name == "artefact.json" else None)
        _serve(root)


@fuzz(20, changes=CHANGES)
def test_hostile_pointer(changes):
    with _copy() as (root, folder):
        document = json.loads((root / "current.json").read_bytes())
        for number, value in changes:
            container, key = _place(document, number)
            container[key] = copy.deepcopy(value)
        (root / "current.json").write_bytes(json.dumps(document).encode())
        with clean_or_one_error() as errors:
            assert open_version(root).folder == folder
        assert not errors or isinstance(errors[0], ArtefactError)
