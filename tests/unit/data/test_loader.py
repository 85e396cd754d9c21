import dataclasses
import json
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsd_dist import schema
from gpsd_dist.data.loader import Loader
from gpsd_dist.data.parquet_dataset import BadValue, BatchKey
from tests.unit.data import parquet_files
from tests.unit.data.parquet_files import NUM_ROWS, write_split

COLUMNS = ["user_hash", "history_length", "history.item"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder, manifest) of the small split."""
    data_dir = tmp_path_factory.mktemp("data")
    return data_dir, write_split(data_dir)


def read_rows(table, key):
    """Checks that the columns of a row belong together; returns (key, rows, tokens)."""
    assert [table[name].num_chunks for name in COLUMNS] == [1, 1, 1]
    rows, lengths = table["user_hash"].to_pylist(), table["history_length"].to_pylist()
    assert table["history.item"].to_pylist() == [[row] * length for row, length in zip(rows, lengths)]
    return key, rows, sum(lengths)


def make_loader(data, make_batch=read_rows, **options):
    if "global_batch_tokens" not in options:
        options.setdefault("global_batch_rows", 10)
    options = {"num_data_shards": 6, "seed": 5, **options}
    return Loader(data[0], data[1], "pretrain", columns=COLUMNS, make_batch=make_batch, **options)


def epoch_rows(data, world_size, **options):
    """[rank][step] -> rows."""
    loaders = [make_loader(data, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    return [[rows for _, rows, _ in loader] for loader in loaders]


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader-")]


@settings(max_examples=40, deadline=None)
@given(
    world_size=st.integers(1, 5),
    more_shards=st.integers(0, 60),
    batch=st.integers(1, 70),
    by_tokens=st.booleans(),
    shuffle=st.booleans(),
    window_rows=st.none() | st.integers(1, 30),
    num_threads=st.integers(1, 3),
    cache_bytes=st.sampled_from([0, 3000, 2**20]),
)
def test_each_row_once_and_equal_steps(data, world_size, more_shards, batch, by_tokens, **options):
    size = {"global_batch_tokens": 4 * batch} if by_tokens else {"global_batch_rows": batch}
    ranks = epoch_rows(data, world_size, num_data_shards=world_size + more_shards, **size, **options)
    assert len({len(steps) for steps in ranks}) == 1
    assert sorted(row for steps in ranks for rows in steps for row in rows) == list(range(NUM_ROWS))


@pytest.mark.parametrize("size", [{"global_batch_rows": 10}, {"global_batch_tokens": 40}])
def test_global_batches_do_not_depend_on_world_size(data, size):
    expected, *others = [
        [sorted(row for rows in step for row in rows) for step in zip(*epoch_rows(data, world_size, **size))]
        for world_size in (1, 2, 3, 6)
    ]
    assert all(other == expected for other in others)


def test_global_batch_rows_is_an_upper_bound(data):
    sizes = [len(rows) for _, rows, _ in make_loader(data, global_batch_rows=9)]
    assert len(sizes) == -(-NUM_ROWS // 9) and max(sizes) <= 9 and max(sizes) - min(sizes) <= 1


def test_token_batches_stay_near_the_budget(tmp_path):
    lengths = np.random.default_rng(0).geometric(1 / 20, 3000)
    manifest = write_split(tmp_path, files=((500, 700), (800, 1000)), lengths=lengths)
    loader = make_loader((tmp_path, manifest), global_batch_tokens=2000, num_data_shards=4)
    tokens = np.array([tokens for _, _, tokens in loader])
    share = lengths.sum() / loader.steps_per_epoch
    assert loader.steps_per_epoch == -(-lengths.sum() // 2000)
    assert np.abs(tokens - share).max() <= 4 * lengths.max() and tokens.std() < 0.05 * share


def test_ranks_get_equal_tokens_of_every_batch_though_files_differ_tenfold(tmp_path):
    """With shards of equal rows, one rank would hold the files of long histories."""
    random = np.random.default_rng(0)
    lengths = np.concatenate([random.integers(mean // 2, 3 * mean // 2 + 1, 1000) for mean in (4, 40, 8, 24)])
    manifest = write_split(tmp_path, files=((500, 500), (500, 500), (500, 500), (500, 500)), lengths=lengths)
    options = {"global_batch_tokens": 8000, "num_data_shards": 8}
    loaders = [make_loader((tmp_path, manifest), rank=rank, world_size=4, **options) for rank in range(4)]
    tokens = np.array([[tokens for _, _, tokens in loader] for loader in loaders])
    assert tokens.sum() == lengths.sum() and tokens.shape[1] == loaders[0].steps_per_epoch
    assert (tokens.max(0) / tokens.mean(0)).max() < 1.06 and (tokens.max(0) / tokens.mean(0)).mean() < 1.03


def test_tokens_that_are_cut_off_do_not_count(tmp_path):
    """Every tenth history is 10 times as long as what is kept of it."""
    lengths = np.where(np.arange(3000) % 10 == 0, 50, 5)
    manifest = write_split(tmp_path, files=((500, 700), (800, 1000)), lengths=lengths)
    options = {"global_batch_tokens": 500, "num_data_shards": 4, "world_size": 2, "max_history_length": 5}

    def kept(table, key):
        return np.minimum(table["history_length"].to_numpy(), 5).sum()

    loaders = [make_loader((tmp_path, manifest), make_batch=kept, rank=rank, **options) for rank in range(2)]
    tokens = np.array([list(loader) for loader in loaders])
    assert tokens.sum() == 5 * 3000 and loaders[0].steps_per_epoch == 5 * 3000 // 500
    assert np.abs(tokens - 250).max() <= 2 * 5


def test_position_in_other_values_of_the_same_counts_is_refused(tmp_path, monkeypatch):
    """A data set that was built anew with other negatives or labels has the same files, rows and tokens."""
    state = make_loader((tmp_path / "a", write_split(tmp_path / "a"))).state_dict()
    make_loader((tmp_path / "same", write_split(tmp_path / "same"))).load_state_dict(state)
    make_table = parquet_files.make_table

    def with_other_items(manifest, lengths):
        table = make_table(manifest, lengths)
        place = table.column_names.index("history.item")
        items = pa.array([[3] * int(length) for length in lengths], table.field(place).type)
        return table.set_column(place, table.field(place), items)

    monkeypatch.setattr(parquet_files, "make_table", with_other_items)
    rebuilt = make_loader((tmp_path / "b", write_split(tmp_path / "b")))
    assert rebuilt.state_dict()["order"] == state["order"] | {"content": rebuilt.state_dict()["order"]["content"]}
    with pytest.raises(ValueError, match=r"content was '\w+', is '\w+'; restore these"):
        rebuilt.load_state_dict(state)
    del state["order"]["content"]  # of a version that did not know it
    rebuilt.load_state_dict(state)


def test_position_of_an_older_cut_by_tokens_is_refused(data):
    """Shards once had equal rows there: the same position would mean other rows."""
    loader = make_loader(data, global_batch_tokens=40)
    state = loader.state_dict()
    del state["order"]["shards_by"], state["order"]["tokens"]
    with pytest.raises(ValueError, match="shards_by was None, is 'tokens'"):
        loader.load_state_dict(state)


def test_order_depends_on_seed_and_epoch_alone(data):
    loader = make_loader(data)
    first, second = ([rows for _, rows, _ in loader] for _ in range(2))
    assert first != second
    assert [rows for _, rows, _ in make_loader(data)] == first
    assert [rows for _, rows, _ in make_loader(data, seed=6)] != first
    loader.load_state_dict(loader.state_dict() | {"epoch": 0, "step": 0})
    assert [rows for _, rows, _ in loader] == first


def test_keys_name_epoch_step_and_rank(data):
    loader = make_loader(data, rank=1, world_size=2)
    keys = [key for _ in range(2) for key, _, _ in loader]
    assert keys == [BatchKey(epoch, step, 1) for epoch in range(2) for step in range(loader.steps_per_epoch)]


@pytest.mark.parametrize("size", [{"global_batch_rows": 10}, {"global_batch_tokens": 40}])
def test_resume_at_each_step_matches_uninterrupted_epochs(data, size):
    whole = make_loader(data, **size)
    expected = [batch for _ in range(2) for batch in whole]
    for stop in range(whole.steps_per_epoch + 1):
        first = make_loader(data, num_threads=2, prefetch=4, **size)
        got = []
        batches = iter(first)
        got = [next(batches) for _ in range(stop)]
        state = json.loads(json.dumps(first.state_dict()))
        first.close()
        second = make_loader(data, **size)
        second.load_state_dict(state)
        while len(got) < len(expected):
            got += list(second)
        assert got == expected


def test_state_counts_batches_handed_out_not_prefetched(data):
    loader = make_loader(data, prefetch=4)
    for key, _, _ in loader:
        state = loader.state_dict()
        last = key.step == loader.steps_per_epoch - 1
        assert (state["epoch"], state["step"]) == ((1, 0) if last else (0, key.step + 1))


def test_resume_at_another_world_size_covers_the_rest(data):
    loader = make_loader(data)
    batches = iter(loader)
    seen = [row for _ in range(2) for row in next(batches)[1]]
    for rank in range(3):
        other = make_loader(data, rank=rank, world_size=3)
        other.load_state_dict(loader.state_dict())
        seen += [row for _, rows, _ in other for row in rows]
    assert sorted(seen) == list(range(NUM_ROWS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 6}, "seed was 5, is 6"),
        ({"num_data_shards": 4}, "num_data_shards was 6, is 4"),
        ({"global_batch_tokens": 10}, "batch_by was 'rows', is 'tokens'"),
        ({"global_batch_rows": 11}, "global_batch was 10, is 11"),
    ],
)
def test_position_of_another_order_is_refused(data, options, message):
    state = make_loader(data).state_dict()
    with pytest.raises(ValueError, match=message):
        make_loader(data, **options).load_state_dict(state)


def test_position_in_other_data_is_refused(data, tmp_path):
    state = make_loader(data).state_dict()
    manifest = write_split(tmp_path, files=((30,), (22,)))
    with pytest.raises(ValueError, match=r"files was '\w+', is '\w+'"):
        make_loader((tmp_path, manifest)).load_state_dict(state)


def test_evaluation_covers_each_row_once_with_empty_batches_where_ranks_run_out(tmp_path):
    manifest = write_split(tmp_path, files=((2,), (1,)))
    ranks = epoch_rows((tmp_path, manifest), 5, shuffle=False, global_batch_rows=2)
    assert ranks == [[[0], []], [[], [1]], [[], [2]], [[], []], [[], []]]
    one = epoch_rows((tmp_path, manifest), 1, shuffle=False, global_batch_rows=2)
    assert [row for rows in one[0] for row in rows] == [0, 1, 2]


def test_small_data_is_decoded_once(data, monkeypatch):
    loader = make_loader(data, num_data_shards=16)
    decoded = []
    decode = loader._split._decode
    monkeypatch.setattr(loader._split, "_decode", lambda group, wanted: decoded.append(group) or decode(group, wanted))
    for _ in range(3):
        list(loader)
    assert sorted(decoded) == list(range(8))


def test_large_row_groups_are_decoded_once_per_shard_without_any_cache(tmp_path, monkeypatch):
    manifest = write_split(tmp_path, files=((400, 400),))
    loader = make_loader((tmp_path, manifest), num_data_shards=2, window_rows=10, cache_bytes=0)
    decoded = []
    decode = loader._split._decode
    monkeypatch.setattr(loader._split, "_decode", lambda group, wanted: decoded.append(group) or decode(group, wanted))
    list(loader)
    assert sorted(decoded) == [0, 1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_bad_value_names_file_row_and_column(tmp_path, shuffle):
    manifest = write_split(tmp_path)

    def refuse(table, key):
        rows = table["user_hash"].to_pylist()
        if 30 in rows:  # row 4 of the last file: 7 + 1 + 13 + 5 rows are before it
            raise BadValue("history.item", rows.index(30), "index 10001 is outside 0 .. 9999")
        return rows

    loader = make_loader((tmp_path, manifest), refuse, shuffle=shuffle)
    with pytest.raises(ValueError) as error:
        for _ in loader:
            pass
    expected = r"part-00002.parquet, row 4 (from 0), column 'history.item': index 10001 is outside 0 .. 9999; correct"
    assert expected in str(error.value)
    assert not loader_threads()


def test_error_in_a_thread_surfaces_at_its_batch(data):
    def fail_at_three(table, key):
        if key.step == 3:
            raise RuntimeError("batch three")
        return key.step

    loader = make_loader(data, fail_at_three, num_threads=3, prefetch=4)
    seen = []
    with pytest.raises(RuntimeError, match="batch three"):
        for step in loader:
            seen.append(step)
    assert seen == [0, 1, 2] and loader.step == 3 and not loader_threads()


def test_damaged_file_surfaces_with_its_name(tmp_path):
    manifest = write_split(tmp_path)
    loader = make_loader((tmp_path, manifest))
    (tmp_path / manifest.splits[0].files[1]).unlink()
    with pytest.raises(ValueError, match=r"part-00001.parquet: row group 0 cannot be decoded"):
        list(loader)


def test_order_is_kept_when_threads_finish_out_of_order(data):
    def slow_even(table, key):
        time.sleep(0.02 * (key.step % 2 == 0))
        return key.step

    loader = make_loader(data, slow_even, num_threads=3)
    assert list(loader) == list(range(loader.steps_per_epoch))


def test_early_stop_ends_the_threads_and_the_next_pass_goes_on(data):
    loader = make_loader(data)
    expected = list(make_loader(data))
    seen = []
    for batch in loader:
        seen.append(batch)
        assert loader_threads()
        break
    assert not loader_threads()
    assert [*seen, *loader] == expected
    iterator = iter(loader)
    next(iterator)
    loader.close()
    assert not loader_threads() and list(iterator) == []


def test_interpreter_ends_while_an_iteration_is_open(data, tmp_path):
    program = textwrap.dedent(
        f"""
        from gpsd_dist import schema
        from gpsd_dist.data.loader import Loader
        manifest = schema.read_manifest({str(tmp_path)!r})
        loader = Loader({str(data[0])!r}, manifest, "pretrain", make_batch=lambda t, k: k.step, global_batch_rows=2)
        batches = iter(loader)
        print(next(batches))
        """
    )
    schema.write_manifest(data[1], tmp_path)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")


def test_more_ranks_than_shards_are_refused(data):
    with pytest.raises(ValueError, match=r"world_size 7 is larger than num_data_shards 6.*set num_data_shards to 7"):
        make_loader(data, world_size=7)


def test_uneven_shards_are_a_warning(data, caplog):
    make_loader(data, world_size=4)
    assert "6 data shards do not divide over 4 ranks" in caplog.text


def test_claimed_tokens_that_would_make_endless_batches_are_refused(data):
    """The position of every batch is computed at once: 10^15 of them would not fit into memory."""
    data_dir, manifest = data
    splits = tuple(dataclasses.replace(split, num_history_tokens=10**15) for split in manifest.splits)
    claiming = dataclasses.replace(manifest, splits=splits)
    with pytest.raises(ValueError, match="into more batches than it has rows"):
        Loader(data_dir, claiming, splits[0].name, make_batch=lambda rows, key: rows, global_batch_tokens=100)
