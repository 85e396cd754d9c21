import mmap

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsd_dist.data.gather import _to_list, gather, one_chunk

ENTRIES = {
    "int64": st.integers(-(2**63), 2**63 - 1),
    "int8": st.integers(-128, 127),
    "float32": st.floats(width=32, allow_nan=False),
    "bool": st.booleans(),
    "string": st.text(max_size=3),
}
TYPES = {name: pa.type_for_alias(name) for name in ENTRIES}
SCHEMA = pa.schema(
    {"row": pa.int64(), "optional": pa.list_(pa.int64()), "bag": pa.list_(pa.list_(pa.int64()))}
    | {name: pa.list_(arrow_type) for name, arrow_type in TYPES.items()}
)
ROW = st.fixed_dictionaries(
    {
        "row": st.integers(0, 9) | st.none(),
        "optional": st.none() | st.lists(st.none() | ENTRIES["int64"], max_size=3),
        "bag": st.lists(st.lists(ENTRIES["int64"], max_size=2), max_size=2),
        **{name: st.lists(entry, max_size=3) for name, entry in ENTRIES.items()},
    }
)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), skipped=st.integers(0, 2))
def test_gathers_what_python_lists_give(data, sizes, skipped):
    """Also from slices, whose lists do not begin at the start of their memory, and of tables in several chunks."""
    rows = [data.draw(st.lists(ROW, min_size=size + skipped, max_size=size + skipped)) for size in sizes]
    parts = [pa.Table.from_pylist(part, schema=SCHEMA).slice(skipped) for part in rows]
    flat = [row for part in rows for row in part[skipped:]]
    order = data.draw(st.lists(st.integers(0, max(len(flat) - 1, 0)), max_size=8 if flat else 0))
    got = gather(parts, np.array(order, np.int64))
    assert got.to_pylist() == [flat[row] for row in order] and got.schema == SCHEMA
    assert all(column.num_chunks == 1 for column in got.columns)
    got.validate(full=True)
    assert gather(parts, None).to_pylist() == flat


def test_no_rows_at_all():
    """Such a table has no chunks either."""
    got = gather([pa.Table.from_batches([], SCHEMA)], np.zeros(0, np.int64))
    assert got.num_rows == 0 and got.schema == SCHEMA
    assert all(column.num_chunks == 1 for column in got.columns)


def test_entries_that_begin_inside_their_memory():
    values = pa.array(range(10)).slice(3)
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 2, 7], pa.int32()), values)
    got = gather([pa.table({"x": lists})], np.array([2, 0, 1]))
    assert got["x"].to_pylist() == [[5, 6, 7, 8, 9], [3, 4], []]


def test_more_entries_than_a_list_can_count_are_an_error():
    """What `take` would return for 2 GiB of entries, in memory that nobody touches."""
    buffers = [None, pa.py_buffer(np.array([0, 2**31], np.int64)), pa.py_buffer(mmap.mmap(-1, 2**31))]
    texts = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, buffers)
    with pytest.raises(pa.ArrowInvalid, match="Integer value 2147483648 not in range"):
        _to_list(texts, pa.list_(pa.int8()))


def test_one_chunk_stays_where_it_is():
    array = pa.array([1, 2, 3])
    assert one_chunk(pa.chunked_array([array])).buffers()[1].address == array.buffers()[1].address
    assert one_chunk(pa.chunked_array([array, array])).to_pylist() == [1, 2, 3, 1, 2, 3]
    assert one_chunk(pa.chunked_array([], pa.int64())).to_pylist() == []
