"""Computes a fractal expansion of ratings block by block (arXiv:1901.08910, section 4; settings of the public ML-20M
expansion).

A small matrix with the singular values of the rating matrix R says which share of R each block of the result keeps.
The block in row i and column j is R under its own orders of rows and columns, each rating kept with that share. Two
things differ from the paper:

- The orders are not quite random. A user of the result is a user of R in every block of a row; if these were any users,
  their sum would be near the mean, and the long tail gone. Here they are users of about the same number of ratings, and
  likewise for items.
- Ids start at 1, and every user gets a time order (the public tool gives neither).
"""

import dataclasses
import typing

import numpy as np
import pyarrow as pa
import scipy.sparse
import scipy.sparse.linalg

SCHEMA = pa.schema([("user", pa.int64()), ("item", pa.int64()), ("time_s", pa.int64())])
START_TIME_S = 1_577_836_800  # 2020-01-01 UTC
DAY_S = 86_400
RANK_NOISE = 0.5  # standard deviation of the log counts by which a block orders users and items; untuned
LEAST_RATE, LARGEST_RATE = 0.001, 0.995  # of the public tool
MAX_BLOCKS = 2**20  # untuned: their shares are in memory, 8 bytes each
MAX_ORDER_BYTES = 2**32  # untuned: the orders of one row of blocks are in memory
LEAST_TIMES = 3  # distinct times that a user needs to count in the small matrix, as in the public tool


@dataclasses.dataclass(frozen=True)
class Expansion:
    """Sizes and seed of an expansion; ValueError for one that cannot be."""

    user_blocks: int = 16
    item_blocks: int = 32
    element_rate: float = 1.0  # scales the shares that the blocks keep
    days: int = 365  # length of the made-up time, from 2020-01-01 on
    batch_rows: int = 1_000_000  # about this many rows are in memory at once
    seed: int = 0

    def __post_init__(self):
        least = {"user_blocks": 1, "item_blocks": 1, "days": 2, "batch_rows": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {low}")
        if self.user_blocks * self.item_blocks > MAX_BLOCKS:
            given = f"--user_blocks {self.user_blocks} x --item_blocks {self.item_blocks}"
            raise ValueError(f"{given} are more than {MAX_BLOCKS:,} blocks; use fewer, or start from more ratings")
        if not 0 < self.element_rate <= 1:
            raise ValueError(f"--element_rate {self.element_rate} must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Ratings:
    """A rating matrix by rows (users): the items of user u are item[start[u] : start[u + 1]]."""

    start: np.ndarray  # int64 [users + 1]
    item: np.ndarray  # int32 [ratings], 0 ... num_items - 1
    rating: np.ndarray  # float32 [ratings]
    num_items: int
    has_times: np.ndarray  # bool [users]: rated at LEAST_TIMES distinct times or more

    @property
    def num_users(self) -> int:
        """Counts the rows of the matrix."""
        return len(self.start) - 1

    @property
    def num_ratings(self) -> int:
        """Counts the entries of the matrix."""
        return len(self.item)


def compact(user, item, rating, time) -> Ratings:
    """Builds the rating matrix from four Arrow columns. ValueError for a missing value or rating."""
    names = ("user", "item", "rating", "time")
    for name, column in zip(names, (user, item, rating, time), strict=True):
        if column.null_count or not len(column):
            raise ValueError(f"the ratings' column {name} has {column.null_count} empty values in {len(column)} rows")
    codes = [np.unique(column.to_numpy(), return_inverse=True) for column in (user, item)]
    (users, row), (items, column_code) = codes
    order = np.argsort(row, kind="stable")
    row, moments = row[order], time.to_numpy()[order]
    by_time = np.lexsort((moments, row))
    is_new = np.ones(len(row), bool)
    is_new[1:] = (row[by_time][1:] != row[by_time][:-1]) | (moments[by_time][1:] != moments[by_time][:-1])
    num_times = np.bincount(row[by_time][is_new], minlength=len(users))
    return Ratings(
        start=np.append(0, np.cumsum(np.bincount(row, minlength=len(users)))),
        item=column_code[order].astype(np.int32),
        rating=rating.to_numpy()[order].astype(np.float32),
        num_items=len(items),
        has_times=num_times >= LEAST_TIMES,
    )


def block_rates(ratings: Ratings, expansion: Expansion) -> np.ndarray:
    """Computes the shares of R that the blocks keep: [user_blocks, item_blocks] in [LEAST_RATE, LARGEST_RATE].

    ValueError if the ratings are too few for so many blocks, or a row of them would not fit into memory.
    """
    order_bytes = 4 * expansion.item_blocks * (ratings.num_users + ratings.num_items)
    if order_bytes > MAX_ORDER_BYTES:
        raise ValueError(
            f"--item_blocks {expansion.item_blocks} orders of {ratings.num_users:,} users and {ratings.num_items:,} "
            f"items take {order_bytes / 1e9:.1f} GB, at most {MAX_ORDER_BYTES / 1e9:.1f} are held; use fewer item "
            "blocks, and more user blocks"
        )
    rank = min(expansion.user_blocks, expansion.item_blocks)
    spread = ratings.rating.std() or 1.0
    matrix = scipy.sparse.csr_matrix(
        ((ratings.rating - ratings.rating.mean()) / spread + 1e-6, ratings.item, ratings.start),
        shape=(ratings.num_users, ratings.num_items),
    )[np.flatnonzero(ratings.has_times)]
    if rank >= min(matrix.shape):
        raise ValueError(
            f"{matrix.shape[0]} users with {LEAST_TIMES} times or more and {matrix.shape[1]} items are too few for "
            f"{expansion.user_blocks} x {expansion.item_blocks} blocks; use fewer blocks or more ratings"
        )
    start = np.random.default_rng(expansion.seed).normal(size=min(matrix.shape))
    left, values, right = scipy.sparse.linalg.svds(matrix.astype(np.float64), k=rank, v0=start)
    left, values, right = left[:, ::-1], values[::-1], right[::-1]
    sign = np.sign(left[np.argmax(np.abs(left), axis=0), np.arange(rank)])  # a singular vector's sign is arbitrary
    small_left = _orthonormal(_resized(left * sign, expansion.user_blocks))
    small_right = _orthonormal(_resized(right.T * sign, expansion.item_blocks))
    small = (small_left * values) @ small_right.T
    spread = small.max() - small.min()
    scaled = (small - small.min()) / spread if spread else np.ones_like(small)
    return np.clip(scaled * expansion.element_rate, LEAST_RATE, LARGEST_RATE)


def _resized(matrix: np.ndarray, num_rows: int) -> np.ndarray:
    """Changes the number of rows: each new one is the mean of those it covers, interpolated linearly at the edges."""
    total = np.vstack([np.zeros(matrix.shape[1]), np.cumsum(matrix, axis=0)])
    edges = np.linspace(0, len(matrix), num_rows + 1)
    sums = np.stack([np.interp(edges, np.arange(len(total)), column) for column in total.T], axis=1)
    return np.diff(sums, axis=0) * num_rows / len(matrix)


def _orthonormal(matrix: np.ndarray) -> np.ndarray:
    """Returns the orthonormal matrix nearest to `matrix` (polar decomposition)."""
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def batches(ratings: Ratings, rates: np.ndarray, expansion: Expansion) -> typing.Iterator[pa.RecordBatch]:
    """Yields the expansion in batches of `SCHEMA`: all rows of a user in one batch, users and their times ascending.

    Equal input gives equal batches wherever the iteration starts, because every draw has its own seed.
    """
    per_user, per_item = np.diff(ratings.start), np.bincount(ratings.item, minlength=ratings.num_items)
    for i, row_rates in enumerate(rates):
        rows_per_user = ratings.num_ratings / ratings.num_users * row_rates.sum()
        step = max(1, int(expansion.batch_rows / rows_per_user))
        places = _rng(expansion, 0, i).permutation(ratings.num_users)
        orders, names = [], []
        for j in range(expansion.item_blocks):
            order = np.empty(ratings.num_users, np.int32)
            order[places] = _ranked(per_user, _rng(expansion, 1, i, j))
            name = np.empty(ratings.num_items, np.int32)
            name[_ranked(per_item, _rng(expansion, 2, i, j))] = _rng(expansion, 3, j).permutation(ratings.num_items)
            orders, names = [*orders, order], [*names, name]
        for first in range(0, ratings.num_users, step):
            last = min(first + step, ratings.num_users)
            parts = []
            for j, rate in enumerate(row_rates):
                rng = _rng(expansion, 4, i, j, first)
                row, item = _kept(ratings, orders[j][first:last], float(rate), rng)
                parts.append((_ids(row + first, i, ratings.num_users), _ids(names[j][item], j, ratings.num_items)))
            user, item = (np.concatenate(arrays) for arrays in zip(*parts))
            yield _in_time_order(user, item, expansion, (i, first))


def _ids(number: np.ndarray, block: int, block_size: int) -> np.ndarray:
    """Makes int64 ids that start at 1. `number` may be int32, but all blocks together can exceed its range."""
    return number.astype(np.int64) + (block * block_size + 1)


def _rng(expansion: Expansion, *place: int) -> np.random.Generator:
    return np.random.default_rng([expansion.seed, *place])


def _ranked(counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Orders users or items by about their number of ratings; the noise gives every block another order."""
    return np.argsort(np.log1p(counts) + RANK_NOISE * rng.normal(size=len(counts)))


def _kept(ratings: Ratings, users: np.ndarray, rate: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws which ratings of some users a block keeps: (0-based place in `users`, item in the order of `ratings`)."""
    lengths = np.diff(ratings.start)[users]
    row = np.repeat(np.arange(len(users)), lengths)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    is_kept = rng.random(len(row)) < rate
    row, offset = row[is_kept], offset[is_kept]
    return row, ratings.item[ratings.start[users[row]] + offset]


def _in_time_order(user: np.ndarray, item: np.ndarray, expansion: Expansion, place: tuple[int, int]) -> pa.RecordBatch:
    """Puts each user's ratings in random order, at distinct seconds within a random stretch of the days."""
    rng = _rng(expansion, 5, *place)
    order = np.lexsort((rng.random(len(user)), user))
    user, item = user[order], item[order]
    users, first, count = np.unique(user, return_index=True, return_counts=True)
    begin, end = np.sort(rng.random((2, len(users))), axis=0) * (expansion.days - 1) * DAY_S
    share = rng.exponential(size=len(user))  # gaps of a Poisson process, scaled to the user's stretch
    total = np.cumsum(share)
    before = np.repeat(total[first] - share[first], count)
    whole = np.repeat(np.add.reduceat(share, first), count) if len(user) else share
    place_in_user = np.arange(len(user)) - np.repeat(first, count)
    moment = np.repeat(begin, count) + (total - before) / np.maximum(whole, 1e-12) * np.repeat(end - begin, count)
    return pa.record_batch([user, item, START_TIME_S + moment.astype(np.int64) + place_in_user], schema=SCHEMA)
