"""Mapped files: vocabularies and items come back as written; collisions and damage are errors."""

import re

import numpy as np
import pytest
import safetensors.numpy

from gpsd_dist.schema import Feature, Manifest, Table
from gpsd_dist.serving.artefact import ArtefactError
from gpsd_dist.serving.items import Items
from gpsd_dist.serving.vocabulary import Vocabulary


def test_rows_of_known_and_unknown_ids(tmp_path):
    Vocabulary.write(tmp_path / "v", np.array([90, 5, 40]), np.array([2, 3, 4]))
    vocabulary = Vocabulary.open(tmp_path / "v", 5)
    assert len(vocabulary) == 3
    assert vocabulary.rows(np.array([5, 6, 90, 1, 40, 2**60])).tolist() == [3, 1, 2, 1, 4, 1]
    Vocabulary.write(tmp_path / "empty", np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert Vocabulary.open(tmp_path / "empty", 2).rows(np.array([5, 1])).tolist() == [1, 1]


@pytest.mark.parametrize("rows", [[2, 3, 5], [1, 2, 3], [-7, 2, 3]])
def test_rows_that_the_table_lacks_are_refused(tmp_path, rows):
    safetensors.numpy.save_file({"id": np.arange(3), "row": np.array(rows, np.int32)}, tmp_path / "v")
    with pytest.raises(ArtefactError, match=re.escape(f"names rows {rows[0]} .. {rows[-1]}, expected 2 .. 4; export")):
        Vocabulary.open(tmp_path / "v", 5)


def test_two_raw_ids_with_one_id_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows \[2, 4\] have one id, 7"):
        Vocabulary.write(tmp_path / "v", np.array([7, 3, 7]), np.array([2, 3, 4]))
    with pytest.raises(ValueError, match="expected 2"):
        Vocabulary.write(tmp_path / "v", np.array([7, 3]), np.array([1, 2]))


def test_a_damaged_file_is_refused(tmp_path):
    safetensors.numpy.save_file({"id": np.arange(9), "row": np.arange(9, dtype=np.int32)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for number in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:number])
        with pytest.raises(ArtefactError, match="export it again"):
            Vocabulary.open(tmp_path / "cut", 9)
    with pytest.raises(ArtefactError, match="expected int64 'index'"):
        Items.open(tmp_path / "whole")
    safetensors.numpy.save_file({"id": np.arange(9), "row": np.arange(8, dtype=np.int32)}, tmp_path / "uneven")
    with pytest.raises(ArtefactError, match="8"):
        Vocabulary.open(tmp_path / "uneven", 9)
    safetensors.numpy.save_file({"index": np.arange(9), "price": np.arange(8.0)}, tmp_path / "uneven")
    with pytest.raises(ArtefactError, match="expected"):
        Items.open(tmp_path / "uneven")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"brand": np.array([0, 1, 9])}, "'brand' holds int64 from 0 to 9, expected integers below 9"),
        ({"brand": np.array([0, -1, 8])}, "'brand' holds int64 from -1 to 8"),
        ({"brand": np.array([0.0, 1.0, 2.0])}, "'brand' holds float64"),
        (
            {"tags": np.array([1, 2]), "tags.offsets": np.array([0, 2, 1, 2])},
            "'tags' has offsets that do not cut its 2",
        ),
        ({"tags": np.array([1, 2])}, "'tags' has offsets"),
        ({"colour": np.array([0, 1, 2])}, "colour"),
    ],
)
def test_attributes_beyond_their_table_are_refused(arrays, message):
    features = (
        Feature("brand", ("candidate",), table="brand"),
        Feature("tags", ("candidate",), table="tags", is_bag=True),
    )
    tables = (Table("brand", 9, ""), Table("tags", 9, ""))
    manifest = Manifest("made", features, tables, (), (), 0)
    Items({"index": np.arange(3), "brand": np.array([0, 1, 8])}).check(manifest)
    with pytest.raises(ValueError, match=re.escape(message)):
        Items({"index": np.arange(3)} | arrays).check(manifest)
