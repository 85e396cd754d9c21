"""The hash of ids: a published test vector, the same in numpy and torch, no structure in its buckets."""

import math

import numpy as np
import pytest
import torch

from gpsd_dist import schema
from gpsd_dist.data import hashing

_BITS = (1 << 64) - 1


def reference_mix(value: int) -> int:
    """SplitMix64's finaliser on Python's integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _BITS
    return value ^ (value >> 31)


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def test_mix_gives_the_published_first_outputs_of_splitmix64():
    increment = 0x9E3779B97F4A7C15  # with seed 0, output n is mix(n * increment)
    inputs = np.array([signed(n * increment & _BITS) for n in (1, 2, 3)], np.int64)
    expected = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    assert hashing.mix(inputs).tolist() == [signed(value) for value in expected]


def test_numpy_torch_and_plain_integers_agree():
    random = np.random.default_rng(0)
    ids = np.concatenate([random.integers(2, 2**63 - 1, 500), np.arange(2, 40), [2**60 + 1, 2**63 - 1]])
    for num_rows in (3, 4, 1000, 2**20 + 7, 2**40):
        expected = [2 + (reference_mix(int(i)) >> 1) % (num_rows - 2) for i in ids]
        assert hashing.hashed_rows(ids, num_rows).tolist() == expected
        assert hashing.hashed_rows(torch.from_numpy(ids), num_rows).tolist() == expected


def test_these_rows_will_never_change():
    """Checkpoints and served models rely on it: if this fails, raise the version in schema.unbounded_fingerprint."""
    ids = np.array([0, 1, 2, 3, 1000, 2**60 + 1], np.int64)
    assert hashing.hashed_rows(ids, 100_000).tolist() == [0, 1, 23565, 63742, 5093, 23811]


@pytest.mark.parametrize(
    "ids",
    [np.arange(2, 100_002), np.arange(2, 100_002) << 20, np.arange(2, 100_002) * 1024 + 7, -np.arange(100_000) + 2**60],
    ids=["consecutive", "upper bits", "multiples", "falling"],
)
def test_structured_ids_fill_buckets_evenly(ids):
    buckets = 1000
    counts = np.bincount(hashing.hashed_rows(ids, buckets + 2), minlength=buckets + 2)[2:]
    chi_square = ((counts - len(ids) / buckets) ** 2 / (len(ids) / buckets)).sum()
    degrees = buckets - 1
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)  # 5 standard deviations of chi-square


def test_every_input_bit_flips_every_output_bit_half_of_the_time():
    num = 4000
    ids = np.random.default_rng(1).integers(0, 2**63 - 1, num)
    base = hashing.mix(ids)
    worst = 0.0
    for bit in range(63):
        flipped = base ^ hashing.mix(ids ^ np.int64(1 << bit))
        rates = np.array([((flipped >> place) & 1).mean() for place in range(64)])
        worst = max(worst, float(np.abs(rates - 0.5).max()))
    assert worst < 6 * math.sqrt(0.25 / num)  # the largest of 4,032 cells; 6 standard deviations


def expected_sharing(num_ids, num_rows):
    """Part of `num_ids` ids that share their row with another one: 1 - (1 - 1 / buckets)^(ids - 1)."""
    buckets = num_rows - schema.NUM_RESERVED_ROWS
    if buckets == 1:
        return float(num_ids > 1)
    return -math.expm1((num_ids - 1) * math.log1p(-1 / buckets))


def expected_pairs(num_ids, num_rows):
    """Expected pairs of ids in one row (birthday formula): ids (ids - 1) / (2 buckets)."""
    return num_ids * (num_ids - 1) / (2 * (num_rows - schema.NUM_RESERVED_ROWS))


def test_collisions_are_those_of_the_birthday_formula():
    num_ids, num_rows = 60_000, 100_002
    counts = np.bincount(hashing.hashed_rows(np.arange(2, num_ids + 2), num_rows))
    sharing = counts[counts > 1].sum() / num_ids
    pairs = (counts * (counts - 1) // 2).sum()
    assert sharing == pytest.approx(expected_sharing(num_ids, num_rows), abs=5 / math.sqrt(num_ids))
    expected = expected_pairs(num_ids, num_rows)
    assert abs(pairs - expected) < 5 * math.sqrt(expected)  # pairs are nearly Poisson
    assert expected_sharing(2, 3) == 1.0
    assert expected_sharing(1, 3) == 0.0
