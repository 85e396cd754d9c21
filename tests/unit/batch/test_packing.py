import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsd_dist.batch.packing import Packing

REQUESTS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5)), max_size=30)


def plan(requests):
    lengths, counts = np.array(sorted(requests), np.int64).reshape(-1, 2).T
    return lengths, counts, Packing.from_lengths(lengths, counts)


@settings(max_examples=100, deadline=None)
@given(requests=REQUESTS)
def test_offsets_positions_and_owners(requests):
    lengths, counts, packing = plan(requests)
    assert packing.num_requests == len(requests)
    assert packing.history_offsets.diff().tolist() == lengths.tolist()
    assert packing.candidate_offsets.diff().tolist() == counts.tolist()
    expected = [position for length in lengths for position in range(length)]
    expected += [length for length, count in zip(lengths, counts) for _ in range(count)]
    assert packing.position_S.tolist() == expected and packing.position_S.dtype == torch.int64
    assert packing.request_C.tolist() == [i for i, count in enumerate(counts) for _ in range(count)]
    assert (packing.num_history_tokens, packing.num_candidates) == (lengths.sum(), counts.sum())
    assert packing.max_history_length == max(lengths, default=0)
    assert packing.candidate_key_count == sum((length + 1) * count for length, count in zip(lengths, counts))
    assert packing.num_pairs == sum(length * count for length, count in zip(lengths, counts))
    assert packing.history_length_B.tolist() == lengths.tolist()
    assert packing.candidate_count_B.tolist() == counts.tolist()


@settings(max_examples=50, deadline=None)
@given(requests=REQUESTS)
def test_without_candidates_is_the_plan_of_the_histories_alone(requests):
    lengths, counts, packing = plan(requests)
    got, expected = packing.without_candidates(), Packing.from_lengths(lengths, np.zeros_like(counts))
    for field in dataclasses.fields(Packing):
        ours, theirs = getattr(got, field.name), getattr(expected, field.name)
        if isinstance(ours, torch.Tensor | np.ndarray):
            assert ours.tolist() == theirs.tolist(), field.name
        elif field.name != "buckets":
            assert ours == theirs, field.name
    for ours, theirs in zip(got.buckets, expected.buckets, strict=True):
        assert (ours.num_requests, ours.width, ours.num_tokens) == (
            theirs.num_requests,
            theirs.width,
            theirs.num_tokens,
        )
        assert (ours.num_candidates, ours.max_candidates, ours.candidate_mask) == (0, 0, None)


@settings(max_examples=100, deadline=None)
@given(requests=REQUESTS)
def test_buckets_cover_every_request_once_in_order(requests):
    lengths, counts, packing = plan(requests)
    start = 0
    for bucket in packing.buckets:
        stop = start + bucket.num_requests
        assert bucket.num_requests > 0
        assert bucket.width == max(lengths[start:stop]) and bucket.max_candidates == max(counts[start:stop])
        assert bucket.num_tokens == lengths[start:stop].sum() and bucket.num_candidates == counts[start:stop].sum()
        start = stop
    assert start == len(requests)


@settings(max_examples=100, deadline=None)
@given(requests=REQUESTS)
def test_slots_lead_there_and_back(requests):
    lengths, counts, packing = plan(requests)
    start = 0
    for bucket in packing.buckets:
        stop = start + bucket.num_requests
        for slots, sizes, width, entries in (
            (bucket.history, lengths[start:stop], bucket.width, bucket.num_tokens),
            (bucket.candidate, counts[start:stop], bucket.max_candidates, bucket.num_candidates),
        ):
            if slots is None:
                assert entries == bucket.num_requests * width
                continue
            assert slots.is_entry.sum(1).tolist() == sizes.tolist()
            assert slots.is_entry.shape == (bucket.num_requests, width)
            assert slots.entry[slots.slot].tolist() == list(range(entries))
            assert slots.is_entry.flatten()[slots.slot].all()
            assert ((slots.entry >= 0) & (slots.entry < max(entries, 1))).all()
        start = stop


def test_widths_grow_by_half_so_that_padding_stays_small():
    lengths, _, packing = plan([(length, 0) for length in range(1, 60)])
    assert [bucket.width for bucket in packing.buckets] == [8, 12, 18, 27, 41, 59]
    padded = sum(bucket.num_requests * bucket.width for bucket in packing.buckets)
    assert padded < 1.25 * lengths.sum()
