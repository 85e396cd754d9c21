"""Spelling and hash of ids: one value in a log and in a request, held against the engine that builds data."""

import hashlib
import math

import hypothesis
import hypothesis.strategies as st
import ibis
import numpy as np
import pyarrow as pa
import pytest

from data_pipeline import hashing
from gpsd_dist import features, schema

SPELLINGS = [
    (pa.array([101, -7, None]), ["101", "-7", None]),
    (pa.array([101.0, 0.5, None, float("nan")]), ["101", "0.5", None, None]),
    (pa.array(["00101", " 101 ", "101.0", "", None]), ["00101", "101", "101.0", None, None]),
    (pa.array([True, False, None]), ["true", "false", None]),
    (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
    (pa.array([b"a", None]), ["a", None]),
    (pa.array([2**63], pa.uint64()), [str(2**63)]),
    (pa.array(["x"], pa.large_string()), ["x"]),
    (pa.array([None, None]), [None, None]),
    (pa.array([1.0, 0.5], pa.float16()), ["1", "0.5"]),
]


@pytest.mark.parametrize(("values", "expected"), SPELLINGS, ids=[str(values.type) for values, _ in SPELLINGS])
def test_an_id_is_spelled_in_one_way_whatever_its_type(values, expected):
    assert features.raw_ids(values).to_pylist() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([1.0, 2.0**60]), "write long numbers as text"),
        (pa.array([float("inf")]), "write long numbers as text"),
        (pa.array([["a"]]), "one id per value"),
        (pa.array([b"\xff"]), "no UTF-8 text"),
    ],
)
def test_what_is_no_id_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        features.raw_ids(values)


def test_id_is_the_first_60_bits_of_md5_above_the_reserved_rows():
    expected = int(hashlib.md5(b"b0001").hexdigest()[:15], 16) + 2
    assert features.id_of(pa.array(["b0001", None, "b0001"])).tolist() == [expected, schema.UNKNOWN_INDEX, expected]
    assert features.id_of(pa.array([], pa.string())).tolist() == []


@hypothesis.given(st.lists(st.none() | st.text(max_size=20), max_size=20))
@hypothesis.settings(max_examples=30, deadline=None)
def test_ids_equal_those_of_the_engine(texts):
    texts = [text and text.replace("\0", "") for text in texts]  # DuckDB's text ends at it
    raw = features.raw_ids(pa.array(texts, pa.string()))
    table = ibis.memtable(pa.table({"place": range(len(raw)), "raw": raw}), schema={"place": "int64", "raw": "string"})
    found = table.select("place", id=hashing.id_of(table.raw)).order_by("place").to_pyarrow()["id"].to_numpy()
    assert found.tolist() == features.id_of(raw).tolist()


def test_numbers_are_standardised_in_float32_and_cut():
    feature = schema.Feature("price", ("candidate",), "numerical", mean=2.0, std=4.0)
    found = features.standardise(feature, np.array([2.0, 6.0, 1e6, -1e6], np.float32))
    assert found.dtype == np.float32 and found.tolist() == [0.0, 1.0, 5.0, -5.0]


def test_logarithms_are_those_of_any_cpu():
    """Held against libm, whose last digit in float64 differs from that of NumPy's kernels for AVX512."""
    feature = schema.Feature("n", ("candidate",), "numerical", mean=1.5, std=3.0, log=True)
    values = np.arange(-3000, 3000, dtype=np.float32)
    expected = [np.float32((math.copysign(math.log1p(abs(value)), value) - 1.5) / 3) for value in values.tolist()]
    assert features.standardise(feature, values).tolist() == [float(value) for value in expected]
    logs = features.logarithm(values)
    assert np.array_equal(np.copysign(np.expm1(np.abs(logs)), logs).astype(np.float32), values)  # edges are values
