"""Fractal expansion: sizes, rates, long tails, bytes and memory."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import fractal, fractal_blocks
from data_pipeline import validate
from tests.unit.data_pipeline.conftest import run

NUM_USERS, NUM_ITEMS = 600, 400


def long_tailed_ratings(num_ratings: int = 12_000) -> pa.Table:
    """Distinct (user, item) pairs, items by a power law; time in random order."""
    rng = np.random.default_rng(0)
    share = np.arange(1, NUM_ITEMS + 1) ** -1.0
    item = rng.choice(NUM_ITEMS, num_ratings, p=share / share.sum())
    user = (rng.pareto(1.5, num_ratings) * 40).astype(np.int64) % NUM_USERS
    pairs = np.unique(user * NUM_ITEMS + item)
    return pa.table(
        {
            "u": pairs // NUM_ITEMS + 7,
            "i": pairs % NUM_ITEMS + 1000,
            "r": rng.integers(1, 6, len(pairs)).astype(np.float64),
            "t": rng.integers(0, 10**6, len(pairs)),
        }
    )


@pytest.fixture(scope="module")
def ratings() -> fractal_blocks.Ratings:
    table = long_tailed_ratings()
    return fractal_blocks.compact(*(table[name] for name in "uirt"))


@pytest.fixture(scope="module")
def expanded(ratings) -> tuple[fractal_blocks.Expansion, np.ndarray, pa.Table]:
    """(options, rates of the blocks, all rows)."""
    options = fractal_blocks.Expansion(user_blocks=4, item_blocks=6, element_rate=0.8, batch_rows=5_000, seed=1)
    rates = fractal_blocks.block_rates(ratings, options)
    return options, rates, pa.Table.from_batches(list(fractal_blocks.batches(ratings, rates, options)))


def test_rates_lie_in_the_bounds_and_reach_both_ends(expanded):
    _, rates, _ = expanded
    assert rates.shape == (4, 6)
    assert rates.min() == fractal_blocks.LEAST_RATE
    assert rates.max() == pytest.approx(0.8)


def test_every_block_keeps_its_share(ratings, expanded):
    _, rates, table = expanded
    user_block = (table["user"].to_numpy() - 1) // ratings.num_users
    item_block = (table["item"].to_numpy() - 1) // ratings.num_items
    kept = np.zeros_like(rates)
    np.add.at(kept, (user_block, item_block), 1)
    noise = np.sqrt(ratings.num_ratings * rates * (1 - rates))
    assert (np.abs(kept - ratings.num_ratings * rates) < 4.5 * np.maximum(noise, 1)).all()
    assert table.num_rows == kept.sum()


def test_ids_start_at_one_and_no_rating_is_doubled(ratings, expanded):
    options, _, table = expanded
    user, item = table["user"].to_numpy(), table["item"].to_numpy()
    assert user.min() >= 1 and user.max() <= ratings.num_users * options.user_blocks
    assert item.min() >= 1 and item.max() <= ratings.num_items * options.item_blocks
    assert len(np.unique(user * (item.max() + 1) + item)) == len(user)


def test_users_are_contiguous_and_their_times_ascend(expanded):
    options, _, table = expanded
    user, time_s = table["user"].to_numpy(), table["time_s"].to_numpy()
    assert (np.diff(user) >= 0).all()
    assert (np.diff(time_s)[np.diff(user) == 0] > 0).all()
    assert time_s.min() >= fractal_blocks.START_TIME_S
    assert time_s.max() < fractal_blocks.START_TIME_S + options.days * fractal_blocks.DAY_S


def test_the_order_in_time_says_nothing_about_the_item_block(ratings, expanded):
    """A user's ratings come from all blocks; written block by block they would be ordered by them."""
    _, _, table = expanded
    user, item = table["user"].to_numpy(), table["item"].to_numpy() // ratings.num_items
    same_user = np.diff(user) == 0
    rises = (np.diff(item)[same_user] > 0).mean()
    falls = (np.diff(item)[same_user] < 0).mean()
    assert abs(rises - falls) < 4 / np.sqrt(same_user.sum())


def top_share(ids: np.ndarray, fraction: float) -> float:
    """Part of the rows that the most frequent `fraction` of the ids have."""
    counts = np.sort(np.unique(ids, return_counts=True)[1])[::-1]
    return counts[: max(1, int(len(counts) * fraction))].sum() / counts.sum()


def test_marginals_keep_their_long_tails(ratings, expanded):
    """Not so with random orders of users and items in every block: their sums even out."""
    _, _, table = expanded
    users_before = np.repeat(np.arange(ratings.num_users), np.diff(ratings.start))
    for before, after in ((ratings.item, table["item"]), (users_before, table["user"])):
        for fraction in (0.01, 0.1, 0.5):
            assert top_share(after.to_numpy(), fraction) > 0.8 * top_share(before, fraction)
        even = np.random.default_rng(0).integers(0, len(np.unique(after)), table.num_rows)
        assert top_share(after.to_numpy(), 0.01) > 3 * top_share(even, 0.01)


def test_same_seed_same_bytes_whatever_the_file_size(tmp_path, ratings):
    digests = []
    for name, seed, file_rows in (("a", 0, 10**9), ("b", 0, 10**9), ("c", 1, 10**9), ("d", 0, 10_000)):
        options = fractal_blocks.Expansion(user_blocks=2, item_blocks=3, seed=seed, batch_rows=8_000)
        about = fractal.write(ratings, options, tmp_path / name, file_rows)
        files = sorted((tmp_path / name).glob("part-*.parquet"))
        assert sum(pq.read_metadata(file).num_rows for file in files) == about["rows"]
        assert (len(files) > 1) == (file_rows == 10_000)
        rows = pa.concat_tables([pq.read_table(file) for file in files]).combine_chunks()
        digests.append(hashlib.sha256(b"".join(column.chunk(0).buffers()[1] for column in rows.columns)).hexdigest())
    assert digests[0] == digests[1] == digests[3] != digests[2]


def test_the_command_reads_movielens_and_the_result_builds(tmp_path, capsys):
    table = long_tailed_ratings(4_000)
    (tmp_path / "raw").mkdir()
    lines = ("::".join(str(value) for value in row.values()) for row in table.to_pylist())
    (tmp_path / "raw" / "ratings.dat").write_text("\n".join(lines).replace(".0::", "::") + "\n")
    pq.write_table(table, tmp_path / "raw" / "log.parquet")
    size = ["--user_blocks", "2", "--item_blocks", "2"]
    raw = ["--raw_dir", str(tmp_path / "raw")]
    assert fractal.main([*raw, "--out_dir", str(tmp_path / "a"), *size]) == 0
    parquet = ["--parquet", "log.parquet", "--columns", "u,i,r,t"]
    assert fractal.main([*raw, "--out_dir", str(tmp_path / "b"), *size, *parquet]) == 0
    one, other = (pq.read_table(tmp_path / name / "part-00000.parquet") for name in "ab")
    assert one.equals(other)
    assert run("--source", "generic", "--raw_dir", tmp_path / "a", "--out_dir", tmp_path / "out") == 0
    manifest = validate.check(tmp_path / "out")
    assert manifest.split("test").num_rows == len(np.unique(one["user"].to_numpy())) - _num_short(one)


def _num_short(table: pa.Table) -> int:
    """Users with fewer than 3 events, who have no test request under leave_last_out."""
    return int((np.unique(table["user"].to_numpy(), return_counts=True)[1] < 3).sum())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--user_blocks", "0"], "--user_blocks 0 must be at least 1"),
        (["--element_rate", "1.5"], "must lie in (0, 1]"),
        (["--user_blocks", "1099511627776", "--item_blocks", "1"], "are more than 1,048,576 blocks"),
        (["--user_blocks", "300", "--item_blocks", "300"], "use fewer blocks or more ratings"),
        (["--parquet", "none.parquet"], "none.parquet does not exist"),
    ],
)
def test_wrong_options_say_what_to_do(tmp_path, capsys, arguments, words):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,3.5,4\n1,3,3,5\n2,2,1,6\n")
    assert fractal.main(["--raw_dir", str(tmp_path), "--out_dir", str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_options_that_would_not_fit_into_memory_are_refused(ratings, tmp_path):
    many = dataclasses.replace(ratings, num_items=10**5)
    options = fractal_blocks.Expansion(user_blocks=1, item_blocks=2**20)
    with pytest.raises(
        ValueError, match=r"--item_blocks 1048576 orders of \d+ users and 100,000 items take 42\d\.\d GB"
    ):
        fractal_blocks.block_rates(many, options)
    with pytest.raises(ValueError, match="--file_rows 0 must be at least 1"):
        fractal.write(ratings, fractal_blocks.Expansion(2, 2), tmp_path / "out", 0)


def test_ids_beyond_31_bits_do_not_wrap():
    ids = fractal_blocks._ids(np.array([0, 2_999], np.int32), 999_999, 3_000)
    assert ids.tolist() == [2_999_997_001, 3_000_000_000] and ids.dtype == np.int64


MEASURE = """
import resource, sys, numpy as np
from benchmarks import fractal_blocks as f
rng = np.random.default_rng(0)
import pyarrow as pa
pairs = np.unique(rng.integers(0, 2000 * 1000, 50_000))
columns = pairs // 1000, pairs % 1000, rng.random(len(pairs)), rng.integers(0, 9**6, len(pairs))
r = f.compact(*(pa.array(column) for column in columns))
o = f.Expansion(user_blocks=8, item_blocks=16, batch_rows=50_000)
rates = np.full((8, 16), 0.8)
before, rows, bytes_ = None, 0, 0
for batch in f.batches(r, rates, o):
    rows, bytes_ = rows + batch.num_rows, bytes_ + batch.nbytes
    if before is None and rows > 200_000:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(rows, bytes_, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_does_not_grow_with_the_result():
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stderr
    rows, num_bytes, growth = (int(word) for word in result.stdout.split())
    assert rows > 4_500_000
    assert growth < num_bytes / 10  # 24 bytes a row: 118 MB came out
