"""The comparison of two commits finds what differs, and nothing where nothing does."""

import json

import pytest

from benchmarks import same_bits


def test_every_kind_of_difference_is_named():
    old = {"1/plain/nt: a": "x", "1/plain/nt: b": "y", "1/plain/nt: gone": "z"}
    new = {"1/plain/nt: a": "x", "1/plain/nt: b": "other", "1/plain/nt: added": "z"}
    assert same_bits.differences(old, new) == [
        "only in the new commit: 1/plain/nt: added",
        "differs: 1/plain/nt: b",
        "only in the old commit: 1/plain/nt: gone",
    ]
    assert not same_bits.differences(old, dict(old))


@pytest.mark.slow
def test_a_commit_equals_itself_and_a_forged_hash_is_found(tmp_path, capsys):
    arguments = ["HEAD", "HEAD", "--keep", str(tmp_path), "--worlds", "1", "--cases", "pretrain"]
    assert same_bits.main(arguments) == 0
    (kept,) = tmp_path.glob("*.json")
    hashes = json.loads(kept.read_text())
    tensors = [name for name in hashes if "dense.backbone" in name]
    assert tensors and any("metrics line" in name for name in hashes) and any("parquet" in name for name in hashes)
    old = hashes | {tensors[0]: "forged"}
    assert same_bits.differences(old, hashes) == [f"differs: {tensors[0]}"]
    assert "bits: same" in capsys.readouterr().out


def test_an_unknown_commit_is_an_error(capsys):
    assert same_bits.main(["no_such_commit"]) == 2
    assert "no_such_commit" in capsys.readouterr().err


def test_manifests_of_several_data_sets_are_kept_apart(tmp_path):
    for name in ("plain", "hashed"):
        (tmp_path / f"data_{name}").mkdir()
        fields = {"features": name, "created": "now", "options": {"raw_dir": "raw", "fingerprint": name}}
        (tmp_path / f"data_{name}" / "manifest.json").write_text(json.dumps(fields))
    hashes = same_bits._hash_data(tmp_path)
    kinds = ("features", "options")
    assert set(hashes) == {f"data_{n}: data_{n}/manifest.json {kind}" for n in ("plain", "hashed") for kind in kinds}
