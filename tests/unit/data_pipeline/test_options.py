"""Options of a build: recorded as ever, frozen, and all mistakes named at once."""

import dataclasses

import pytest

from data_pipeline import command_line, fingerprint, sources

LOG = "u,i,t\na,x,1\n"
SCHEMA = (
    '[history]\nfiles = "log.csv"\nuser = "u"\nitem = "i"\ntime = "t"\n'
    '[options]\nmin_count = 2\nnegatives = "popularity"\n[split]\nvalid_fraction = 0.3\n'
)
DEFAULTS = {
    "max_history_length": 50,
    "min_count": 1,
    "vocabulary": "training",
    "no_valid": False,
    "valid_fraction": 0.15,
    "num_negatives": 1,
    "negatives": "uniform",
    "hashed_features": "",
    "managed_features": "",
    "counts": "",
    "user_counts": False,
    "rates": 0,
    "daily_requests": False,
    "seed": 0,
    "compression": "zstd",
    "row_group_rows": 4096,
    "file_rows": 1048576,
}
BY_TOML = {"min_count": 2, "valid_fraction": 0.3, "negatives": "popularity"}
# Command, recorded options that are not DEFAULTS, and fingerprint, as computed with fingerprint._code_sha256
# replaced by "code": a data set must look changed only where an option was added on purpose.
RECORDED = [
    (
        "--source amazon_grocery --valid_fraction 0.25 --threads 3 --num_buckets 5 --force",
        {"valid_fraction": 0.25},
        "7b347f390d236189c89808a328f7e031",
    ),
    (
        "--source kuairand_pure --hashed_features author:50 --managed_features item:20 --compression lz4",
        {"hashed_features": "author:50", "managed_features": "item:20", "compression": "lz4"},
        "4fabeafcf0c777f90322bf3c481c62b8",
    ),
    (
        "--source taobao --behaviours pv,buy",
        {"max_history_length": 200, "behaviours": "pv,buy", "train_quantile": 0.7},
        "b542c05ce0677d3e7b3ee65b096df757",
    ),
    (
        "--source amazon_reviews --all_categories --max_history_length 20 --seed 7",
        {"max_history_length": 20, "seed": 7, "train_quantile": 0.7, "all_categories": True, "no_meta": False},
        "4b3ecf2d2558c7bc992eef6396f7ee81",
    ),
    (
        "--source movielens --no_valid --vocabulary all_items --no_genres --row_group_rows 64 --file_rows 128",
        {"row_group_rows": 64, "file_rows": 128, "split_rule": "leave_last_out", "train_quantile": 0.7}
        | {"no_valid": True, "vocabulary": "all_items", "no_genres": True},
        "d3c9701f40dff7531ab94998918a7f30",
    ),
    (
        "--source synthetic --synthetic_seed 3 --num_negatives 4",
        BY_TOML | {"num_negatives": 4, "synthetic_seed": 3, "schema": None},
        "21b1d2b0916625fe2a04f1367cd3f9fa",
    ),
    (
        "--source generic --num_negatives 3 --min_count 1",
        BY_TOML | {"num_negatives": 3, "min_count": 1, "schema": None},
        "6be5683aaea0a8bbe40eb55b6af211ab",
    ),
    (
        "--source generic --schema raw/schema.toml",
        BY_TOML | {"schema": "raw/schema.toml"},
        "2a9a966e3cb5a128f4728c41eff32ef7",
    ),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with `raw/log.csv` and its description."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "log.csv").write_text(LOG)
    (tmp_path / "raw" / "schema.toml").write_text(SCHEMA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(words: str):
    return command_line.parse([*words.split(), "--raw_dir", "raw", "--out_dir", "out"])


@pytest.mark.parametrize(("command", "changed", "expected"), RECORDED, ids=[c[0].split()[1] for c in RECORDED])
def test_recorded_options_and_fingerprint_are_those_of_earlier_data_sets(
    folder, monkeypatch, command, changed, expected
):
    monkeypatch.setattr(fingerprint, "_code_sha256", lambda: "code")
    options = parse(command)
    options = sources.complete(sources.load(options.source), options)
    prints = fingerprint.describe({"log": folder / "raw" / "log.csv"}, options.recorded(), options.source)
    assert prints["options"] == DEFAULTS | changed
    assert list(prints["options"]) == list(DEFAULTS | changed)  # the manifest keeps this order
    assert prints["fingerprint"] == expected


def test_a_schema_is_the_same_option_named_or_found(folder):
    def fingerprint_of(words: str) -> str:
        source, options = sources.load("generic"), parse(f"--source generic {words}")
        return fingerprint.describe(source.find_files(options), options.recorded(), "generic")["fingerprint"]

    path = folder / "raw" / "schema.toml"
    found = {fingerprint_of(words) for words in ("", "--schema raw/schema.toml", f"--schema {path}")}
    assert len(found) == 1
    path.write_text(SCHEMA + "# another file\n")
    assert fingerprint_of("") not in found


def test_every_source_has_options_with_a_rule_about_recording():
    for name in sources.SOURCES:
        options = parse(f"--source {name}")
        for part in (options, *([] if options.own is None else [options.own])):
            assert all(field.metadata["is_recorded"] in (True, False) for field in dataclasses.fields(part))
        assert {"max_history_length", "seed"} <= options.recorded().keys()
        assert not {"raw_dir", "out_dir", "engine", "num_buckets", "force", "given", "own"} & options.recorded().keys()


def test_options_cannot_be_changed(folder):
    options = parse("--source movielens")
    for part, name in ((options, "min_count"), (options.own, "no_genres")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, getattr(part, name))


def test_the_toml_file_fills_what_was_not_typed_and_no_more(folder):
    options = sources.complete(sources.load("generic"), parse("--source generic --min_count 1 --negatives uniform"))
    assert (options.min_count, options.negatives, options.valid_fraction) == (1, "uniform", 0.3)


def test_all_mistakes_are_named_at_once(folder):
    words = "--min_count 0 --valid_fraction nan --num_buckets 5000 --append_to day1 --split holdout"
    with pytest.raises(ValueError, match="min_count") as error:
        parse(f"--source generic {words}")
    message = str(error.value)
    assert "--min_count 0 must be at least 1" in message
    assert "--valid_fraction nan must be a finite number" in message
    assert "--num_buckets 5000 must be at most 4096" in message
    assert "--append_to adds the later day as `test`; leave --split out" in message
    assert message.count(";") == 4


def test_modes(folder):
    assert parse("--source generic").mode == "build"
    assert parse("--source generic --split holdout").mode == "holdout"
    assert parse("--source generic --append_to day1").mode == "append"
