"""The map of a managed table against a plain dict that follows docs/ids.md word by word."""

import numpy as np
import pytest
import torch

from gpsd_dist.config.ids import EVICTIONS, IdsConfig
from gpsd_dist.tables.admission_filter import AdmissionFilter
from gpsd_dist.tables.managed_collision import ManagedCollisionMap, map_bytes

CPU = torch.device("cpu")


class PlainMap:
    """Who has a row and who waits, by the rules in words. Which row an id gets is not said here."""

    def __init__(self, num_rows: int, config: IdsConfig):
        self.num_ids, self.capacity, self.config = num_rows - 2, num_rows, config
        self.owners: dict[int, tuple[int, int]] = {}  # id -> occurrences, last update
        self.waiting: dict[int, tuple[int, int]] = {}
        self.now = 0

    def update(self, counts: dict[int, int]) -> None:
        self.now += 1
        offered = {}
        for id_, count in counts.items():
            if id_ in self.owners:
                self.owners[id_] = (self.owners[id_][0] + count, self.now)
            else:
                total = self.waiting.pop(id_, (0, 0))[0] + count
                self.waiting[id_] = (total, self.now)
                if total >= self.config.admission_threshold:
                    offered[id_] = (total, self.now)
        # Best score stays; among equals whoever is there already (smaller id first), then newcomers with more
        # occurrences (smaller id first).
        ranked = [(-self.score(entry), 0, 0, id_) for id_, entry in self.owners.items()]
        ranked += [(-self.score(entry), 1, -entry[0], id_) for id_, entry in offered.items()]
        kept = {id_ for *_, id_ in sorted(ranked)[: self.num_ids]}
        entries = self.owners | offered
        self.owners = {id_: entries[id_] for id_ in kept}
        self.waiting = {id_: entry for id_, entry in self.waiting.items() if id_ not in kept}
        by_merit = sorted(self.waiting.items(), key=lambda item: (-item[1][1], -item[1][0], item[0]))
        self.waiting = dict(by_merit[: self.capacity])

    def score(self, entry: tuple[int, int]) -> float:
        count, last_seen = entry
        if self.config.eviction == "lfu":
            return count
        if self.config.eviction == "lru":
            return last_seen
        return float(np.float32(count) / np.float32(self.now - last_seen + 1))


def make(num_rows: int = 12, **options) -> ManagedCollisionMap:
    return ManagedCollisionMap(num_rows, IdsConfig(**options), CPU)


def give(managed: ManagedCollisionMap, counts: dict[int, int]) -> list[int]:
    """One update; the rows that changed hands."""
    ids, numbers = list(counts), list(counts.values())
    changed = managed.update(torch.tensor(ids, dtype=torch.int64), torch.tensor(numbers, dtype=torch.int64))
    return sorted(changed.tolist())


def owners(managed: ManagedCollisionMap, ids) -> dict[int, int]:
    """id -> row, of those that have one."""
    rows = managed.rows(torch.tensor(list(ids), dtype=torch.int64)).tolist()
    return {id_: row for id_, row in zip(ids, rows, strict=True) if row != 1}


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("threshold", [1, 3])
def test_who_has_a_row_follows_the_rules_in_words(eviction, threshold):
    config = IdsConfig(eviction=eviction, admission_threshold=threshold)
    managed, plain = ManagedCollisionMap(12, config, CPU), PlainMap(12, config)
    random = np.random.default_rng(7)
    universe = list(2 + (np.arange(60) ** 5) * 10**8)
    before: dict[int, int] = {}
    was_full = num_evicted = 0
    for step in range(150):
        drawn = random.zipf(1.3, size=int(random.integers(0, 25))) + step // 4  # interests drift: old ids go stale
        counts: dict[int, int] = {}
        for place in drawn:
            id_ = int(universe[int(place) % 60])
            counts[id_] = counts.get(id_, 0) + 1
        changed = give(managed, counts)
        plain.update(counts)
        now = owners(managed, [int(id_) for id_ in universe])
        assert set(now) == set(plain.owners)
        assert len(set(now.values())) == len(now) and all(2 <= row < 12 for row in now.values())
        assert all(now[id_] == before[id_] for id_ in set(now) & set(before)), "an id moved"
        assert changed == sorted(row for id_, row in now.items() if id_ not in before)
        assert managed.occupied().tolist() == sorted(now.values())
        was_full += len(now) == 10
        num_evicted += len(set(before) - set(now))
        before = now
    assert was_full > 50 and num_evicted > 5


def test_an_id_gets_its_row_with_the_threshold_th_occurrence_and_not_before():
    managed = make(admission_threshold=3)
    assert give(managed, {10**15: 1}) == []
    assert owners(managed, [10**15]) == {}
    assert give(managed, {7: 2}) == []
    assert give(managed, {10**15: 1}) == []
    (row,) = give(managed, {10**15: 1, 7: 0})
    assert owners(managed, [10**15, 7]) == {10**15: row}
    assert len(give(managed, {8: 3})) == 1  # all in one batch


def test_padding_and_unknown_never_get_a_row():
    managed = make(admission_threshold=1)
    assert len(give(managed, {0: 5, 1: 900, 2: 1})) == 1
    assert managed.rows(torch.tensor([0, 1, 2, 3])).tolist()[:2] == [1, 1]
    assert len(managed.occupied()) == 1


def test_a_full_lfu_table_lets_in_whoever_occurred_more_often_than_the_rarest():
    managed = make(num_rows=4, admission_threshold=1)
    give(managed, {100: 5, 200: 3})
    assert give(managed, {300: 3}) == []  # a tie: whoever is there stays
    assert set(owners(managed, [100, 200, 300])) == {100, 200}
    row = owners(managed, [200])[200]
    assert give(managed, {300: 1}) == [row]  # 4 occurrences now, as those without a row count on
    assert set(owners(managed, [100, 200, 300])) == {100, 300}
    assert give(managed, {200: 4}) == []  # who was evicted begins at 0: 4 ties with 300's 4
    assert give(managed, {200: 1}) == [row]


def test_a_full_lru_table_lets_every_new_id_in_and_keeps_those_of_the_batch():
    managed = make(num_rows=5, admission_threshold=1, eviction="lru")
    give(managed, {100: 9})
    give(managed, {200: 9})
    give(managed, {300: 9})
    row = owners(managed, [200])[200]
    assert give(managed, {100: 1, 400: 1}) == [row]  # 200 is the one longest unseen
    assert set(owners(managed, [100, 200, 300, 400])) == {100, 300, 400}
    give(managed, {500: 1, 600: 3, 700: 2, 800: 3})  # more than rows: those with most occurrences
    assert set(owners(managed, [100, 300, 400, 500, 600, 700, 800])) == {600, 700, 800}


def test_distance_lfu_forgets_what_was_frequent_long_ago():
    managed = make(num_rows=3, admission_threshold=1, eviction="distance_lfu")
    give(managed, {100: 4})
    assert give(managed, {200: 1}) == []  # 4 / 2 against 1 / 1
    assert give(managed, {200: 1}) != []  # 4 / 3 against 2 / 1


def test_state_is_complete_and_loads_in_place():
    options = {"admission_threshold": 2, "eviction": "distance_lfu"}
    source, target = make(**options), make(**options)
    random = np.random.default_rng(3)
    steps = [{int(i): int(n) for i, n in zip(random.integers(2, 50, 9), random.integers(1, 4, 9))} for _ in range(40)]
    for counts in steps[:20]:
        give(source, counts)
    for name, value in target.state().items():
        value.copy_(source.state()[name])
    for counts in steps[20:]:
        assert give(source, counts) == give(target, counts)
    assert all(torch.equal(value, target.state()[name]) for name, value in source.state().items())
    assert source.num_updates == target.num_updates == 40


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_the_plan_counts_what_a_map_holds(eviction):
    held = sum(tensor.numel() * 8 for tensor in make(num_rows=50_000, eviction=eviction).state().values())
    assert map_bytes(50_000, eviction) == pytest.approx(held, rel=1e-3)  # but for a few single numbers


def test_reading_changes_nothing():
    managed = make(admission_threshold=1)
    give(managed, {5: 1})
    before = {name: value.clone() for name, value in managed.state().items()}
    managed.rows(torch.arange(100))
    managed.occupied()
    assert all(torch.equal(value, before[name]) for name, value in managed.state().items())


def test_waiting_list_drops_the_longest_unseen_then_the_rarest_then_the_largest():
    waiting = AdmissionFilter(3, CPU)

    def put(counts: dict[int, int], now: int) -> None:
        ids, numbers = torch.tensor(list(counts)), torch.tensor(list(counts.values()))
        waiting.put(ids, numbers, torch.ones(len(counts)).bool(), now)

    put({10: 9}, 1)
    put({20: 1, 30: 2, 40: 1}, 2)
    assert waiting.counts_of(torch.tensor([10, 20, 30, 40])).tolist() == [0, 1, 2, 1]
    put({50: 1}, 3)
    assert waiting.counts_of(torch.tensor([20, 30, 40, 50])).tolist() == [1, 2, 0, 1]
    waiting.put(torch.tensor([30]), torch.tensor([5]), torch.tensor([False]), 4)
    assert waiting.counts_of(torch.tensor([20, 30, 50])).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eviction": "fifo"}, "eviction 'fifo' is not one of"),
        ({"admission_threshold": 0}, "admission_threshold 0 must be >= 1"),
        ({"kinds": {"item": "vocabulary"}}, r"kinds\['item'\] 'vocabulary' is not one of"),
        ({"rows": {"item": 2}}, r"rows\['item'\] is 2, expected more than the 2 reserved"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        IdsConfig(**options)
