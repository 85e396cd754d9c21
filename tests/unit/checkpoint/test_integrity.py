"""Every kind of damage is found, and the file is named; sound checkpoints pass."""

import pytest

from gpsd_dist.checkpoint import integrity, retention
from gpsd_dist.checkpoint.integrity import DamagedCheckpoint
from tests.unit.checkpoint.folders import DATA, add

FILES = (*DATA, retention.STATE_NAME)


def test_sound_checkpoint_passes(tmp_path):
    folder = add(tmp_path, 3, time_s=5.0)
    integrity.check(folder)
    sums = integrity.read_checksums(folder)
    assert sums.time_s == 5.0 and sorted(sums.files) == sorted(FILES)
    assert integrity.wrong_sizes(folder, sums) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "longer", "missing"])
def test_damage_is_found_and_the_file_named(tmp_path, name, damage):
    folder = add(tmp_path, 3)
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 128]))
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else content + b"x")
    with pytest.raises(DamagedCheckpoint) as error:
        integrity.check(folder)
    what = {"flipped bit": "SHA-256 differs", "missing": "is missing"}.get(damage, "were written")
    assert str(folder) in str(error.value) and f"{name} " in str(error.value) and what in str(error.value)
    assert all(f"{other} " not in str(error.value) for other in FILES if other != name)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "time_s": 0, "files": {"a": 1}}'])
def test_broken_checksums_are_damage(tmp_path, text):
    folder = add(tmp_path, 3)
    (folder / integrity.CHECKSUMS_NAME).write_text(text)
    with pytest.raises(DamagedCheckpoint, match=integrity.CHECKSUMS_NAME):
        integrity.check(folder)


def test_missing_checksums_are_damage_unless_there_never_were_any(tmp_path):
    lost, older = add(tmp_path, 3, has_checksums=True), add(tmp_path, 4, has_checksums=False)
    (lost / integrity.CHECKSUMS_NAME).unlink()
    with pytest.raises(DamagedCheckpoint, match=r"checksums.json is missing, and run_state.json says") as error:
        integrity.check(lost)
    assert str(lost) in str(error.value)
    assert integrity.read_checksums(older) is None
    integrity.check(older)


def test_all_damaged_files_are_named_at_once(tmp_path):
    folder = add(tmp_path, 3)
    (folder / ".metadata").unlink()
    (folder / "__1_0.distcp").write_bytes(b"other stuff, long")
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata is missing; __1_0.distcp is not what was written"):
        integrity.check(folder)


def test_a_file_that_cannot_be_read_is_no_damage(tmp_path):
    """A store that does not answer must not send a run back to an older checkpoint."""
    folder = add(tmp_path, 3)
    (folder / ".metadata").unlink()
    (folder / ".metadata").mkdir()
    sums = integrity.read_checksums(folder).files[".metadata"]
    path = folder / integrity.CHECKSUMS_NAME
    size = (folder / ".metadata").stat().st_size
    path.write_text(path.read_text().replace(f'"num_bytes": {sums.num_bytes}\n', f'"num_bytes": {size}\n'))
    with pytest.raises(OSError, match="rank 0 cannot verify"):
        integrity.check(folder)
