"""What a newcomer's folder may lack, each said in his words before anything is trained."""

import dataclasses
import itertools
import shutil

import numpy as np
import pyarrow as pa
import pytest

from gpsd_dist import schema
from gpsd_dist.fit.data_check import look
from tests.helpers.synthetic import make_rows, write_dataset, write_split


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, seed=0, num_rows=60)
    return folder


def changed(data, tmp_path, **changes) -> str:
    """The message for the data set with another manifest; its files are those of `data`."""
    manifest = dataclasses.replace(schema.read_manifest(data), **changes)
    for split in manifest.splits:
        shutil.copytree(data / split.name, tmp_path / split.name)
    schema.write_manifest(manifest, tmp_path)
    with pytest.raises(ValueError) as caught:
        look(tmp_path)
    return str(caught.value)


def test_good_data_are_counted(data):
    facts = look(data)
    assert facts.tasks == ("click", "buy") and facts.can_pretrain
    table = facts.splits["valid"]
    labels = [
        label
        for row in pa.parquet.read_table(data / "valid")["label.click"].to_pylist()
        for label in row
        if label is not None
    ]
    assert (table.candidates, table.positives) == (len(labels), sum(labels)) and 0 < table.users <= 60
    lines = list(facts.lines())
    assert lines[0].startswith("pretrain: 60 histories with ") and "with click, of" in lines[2]
    assert lines[4].startswith("note: valid is thin. It knows an AUC to +- 0.09 only") and len(lines) == 6
    enough = dataclasses.replace(table, candidates=40_000, positives=10_000)
    splits = facts.splits | {"valid": enough, "test": enough}
    assert len(list(dataclasses.replace(facts, splits=splits).lines())) == 4


def test_identity_is_that_of_the_content_and_not_of_the_folder(data, tmp_path):
    manifest = schema.read_manifest(data)
    other = dataclasses.replace(manifest, command="built elsewhere", sources=({"path": "x"},))
    grown = dataclasses.replace(manifest, tables=(*manifest.tables, schema.Table("more", 3, "f")))
    prints = [dataclasses.replace(look(data), manifest=one).fingerprint for one in (manifest, other, grown)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "does not exist; it is the folder that was built from your log: python -m data_pipeline.build"),
        ([], "is empty: build it from your log first"),
        (["notes.md"], "holds no manifest.json: build it"),
        (
            ["log.csv", "items.jsonl"],
            "holds raw files (items.jsonl, log.csv) and no manifest.json: describe their columns",
        ),
    ],
)
def test_a_folder_that_was_not_built(tmp_path, files, words):
    folder = tmp_path / "mine"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("x")
    with pytest.raises(ValueError) as caught:
        look(folder)
    assert words in str(caught.value) and "data_pipeline.build" in str(caught.value)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "log.csv").write_text("x")
    with pytest.raises(ValueError, match=r"log\.csv is a file; it is the folder"):
        look(tmp_path / "log.csv")


@pytest.mark.parametrize("missing", ["valid", "test"])
def test_without_a_split_nothing_can_be_chosen_or_judged(data, tmp_path, missing):
    splits = tuple(split for split in schema.read_manifest(data).splits if split.name != missing)
    folder = tmp_path / "versions" / "0001-0123abcd"
    folder.mkdir(parents=True)
    message = changed(data, folder, splits=splits)
    assert f"has no rows in {missing}: `valid` chooses" in message and "valid_from and test_from" in message
    assert message.endswith(f"--out_dir {tmp_path}")  # where it was built, and not within


def test_histories_alone_have_no_clicks_to_predict(data, tmp_path):
    splits = tuple(split for split in schema.read_manifest(data).splits if split.name == "pretrain")
    message = changed(data, tmp_path, tasks=(), splits=splits)
    assert "there are no clicks to predict" in message and "[exposure]" in message and "pretrain.gin" in message


@pytest.mark.parametrize(
    ("split", "positives", "words"),
    [
        ("valid", 0, "with one class alone nothing can be told apart"),
        ("train", None, "with one class alone"),
        ("test", 3, "too few rows, at least 10 of each class are needed"),
    ],
)
def test_labels_that_cannot_be_learnt_from(data, tmp_path, split, positives, words):
    manifest = schema.read_manifest(data)
    rows = make_rows(manifest, split, seed=0, num_rows=60)
    lengths = [len(row) for row in rows["label.click"].to_pylist()]
    label_N = np.ones(sum(lengths)) if positives is None else np.arange(sum(lengths)) < positives
    offsets = np.cumsum([0, *lengths])
    labels = [label_N[a:b].astype(float).tolist() for a, b in itertools.pairwise(offsets)]
    index = rows.schema.get_field_index("label.click")
    rows = rows.set_column(index, rows.schema.field(index), pa.array(labels, rows.schema.field(index).type))
    written = write_split(tmp_path, split, rows)
    for other in manifest.splits:
        if other.name != split:
            shutil.copytree(data / other.name, tmp_path / other.name)
    splits = tuple(written if one.name == split else one for one in manifest.splits)
    schema.write_manifest(dataclasses.replace(manifest, splits=splits), tmp_path)
    with pytest.raises(ValueError) as caught:
        look(tmp_path)
    assert "put another task first in the schema (`buy`): the first one decides" in str(caught.value)
    assert ("what was shown and not clicked" in str(caught.value)) == (positives is None)
    count = sum(lengths) if positives is None else positives
    assert f"{count} of {sum(lengths)} candidates of `{split}` in {tmp_path} have click = 1: {words}" in str(
        caught.value
    )
