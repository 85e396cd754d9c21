"""The suites measure what they say: variants are what their names say, tables and exponents are computed right."""

import dataclasses
import logging

import pytest
import torch

from benchmarks import compare, datasets, growth, remote, sides
from benchmarks.padded_baseline import PaddedBaseline, PaddedLoader
from benchmarks.remote import Block, running
from benchmarks.run import selected
from benchmarks.sides import VARIANTS, SideSpec, Size, variants_of
from benchmarks.step_split import PHASES
from benchmarks.tables import Table
from tests.helpers import forked

SIZE = Size(1, 16, 2)


@pytest.fixture
def data(tmp_path):
    source = dataclasses.replace(
        datasets.SOURCES["grocery"],
        max_history_length=12,
        batch_rows=16,
        draw_lengths=datasets.Geometric(5, 12),
        num_items=40,
        num_rows=64,
    )
    return lambda kind: datasets.prepare_synthetic(kind, kind, source, datasets.CANDIDATES_PER_ROW[kind], tmp_path)


def test_a_side_trains_in_a_process_of_its_own(data, tmp_path):
    spec = SideSpec("product", data("discriminative"), SIZE, 16, tmp_path / "run")
    with running({"one": spec}) as remotes:
        block = remotes["one"].block(2)
        facts = remotes["one"].facts(1)
    assert block.num_steps == 2 and block.num_tokens > 0 and block.cpu_s > 0
    assert facts.table_bytes > 0 and set(facts.step_split_ms) == {"CPU", "wall"}
    assert not remotes["one"].process.is_alive()


def test_a_side_that_fails_says_why(data, tmp_path, monkeypatch):
    monkeypatch.setattr(remote.multiprocessing, "get_context", forked.context)
    spec = SideSpec("product + wings", data("discriminative"), SIZE, 16, tmp_path / "run")
    with pytest.raises(RuntimeError, match="variant 'product \\+ wings' is not one of"), running({"one": spec}):
        pass


@pytest.mark.parametrize("kind", ["pretrain", "discriminative_k2"])
def test_parts_of_the_baseline_do_not_change_its_loss(kind, data):
    """Packed tower and columnar loader: the same function of the same rows; shared negatives: other draws."""
    prepared = data(kind)
    losses, weights = {}, None
    for name, loader_options, is_packed in (
        ("plain", {}, False),
        ("packed", {}, True),
        ("columnar", {"is_columnar": True}, False),
    ):
        loader = PaddedLoader(
            prepared.data_dir, prepared.manifest, prepared.split, batch_rows=16, num_negatives=0, **loader_options
        )
        batch, tokens = next(iter(loader))
        side = PaddedBaseline(loader, prepared.manifest, layers=1, width=16, heads=2, is_packed=is_packed)
        weights = weights or side.model.state_dict()
        side.model.load_state_dict(weights)
        if kind == "pretrain":
            negatives = torch.randint(2, 42, (16, 8), generator=torch.Generator().manual_seed(0))
            batch = dataclasses.replace(batch, negative_BN=negatives)
        losses[name] = (tokens, side.model.loss(batch).item())
    for name in ("packed", "columnar"):
        assert losses[name] == (losses["plain"][0], pytest.approx(losses["plain"][1], rel=1e-5)), name


def test_shared_negatives_equal_own_ones_when_all_rows_have_the_same(data):
    prepared = data("pretrain")
    loader = PaddedLoader(prepared.data_dir, prepared.manifest, "pretrain", batch_rows=16)
    batch, _ = next(iter(loader))
    model = PaddedBaseline(loader, prepared.manifest, layers=1, width=16, heads=2).model
    one = torch.randint(2, 42, (1, 8), generator=torch.Generator().manual_seed(0))
    own, shared = (dataclasses.replace(batch, negative_BN=one.expand(count, 8)) for count in (16, 4))
    assert model.loss(shared).item() == pytest.approx(model.loss(own).item(), rel=1e-5)


def test_plain_softmax_is_the_fused_one():
    torch.manual_seed(0)
    query, unit = torch.randn(6, 8), torch.nn.functional.normalize(torch.randn(20, 8), dim=-1)
    target, negative = torch.randint(20, (6,)), torch.randint(20, (2, 5))
    arguments = (query, unit, (target, target, negative, negative), (0, 3, 6), 20.0)
    plain = sides._PlainSoftmax.apply(*arguments)
    torch.testing.assert_close(plain, sides.losses._SampledSoftmax.apply(*arguments, False))


def test_every_variant_belongs_to_a_kind():
    assert set(variants_of("pretrain")) | set(variants_of("discriminative")) == set(VARIANTS)
    assert "product - fused softmax loss" not in variants_of("discriminative")


def test_ratios_compare_neighbours():
    slow = [Block(1, 100, 1.0, 1.0), Block(1, 100, 2.0, 2.0), Block(1, 100, 4.0, 4.0)]
    fast = [Block(1, 100, 0.5, 1.0), Block(1, 100, 0.5, 1.0), Block(1, 100, 2.0, 4.0)]
    entry = compare._entry("x", slow, fast)
    assert (entry["ratio"], entry["ratio_min"], entry["ratio_max"], entry["pairs"]) == (2.0, 2.0, 4.0, 3)


def test_tables_state_the_batch_of_both_sides_and_every_phase():
    blocks = [Block(1, 100, 1.0, 1.0)]
    split = {clock: dict.fromkeys(PHASES, 1.0) for clock in ("CPU", "wall")}
    entry = compare._entry("x", blocks, blocks) | {"batch_requests": 16, "baseline_batch_requests": 12}
    entry |= {"examples_per_cpu_s": 16.0, "table_bytes_per_step": 0.0, "peak_mib": 1.0, "baseline_peak_mib": 2.0}
    ratios, phases, _ = compare.comparison_tables([entry | {"step_split_ms": split}])
    assert ratios.rows[0][ratios.columns.index("requests / step")] == "16 / 12"
    assert {"H2D", "collectives"} < set(phases.columns) and [row[1] for row in phases.rows] == ["CPU", "wall"]


def test_large_towers_have_one_batch_for_both_sides(data):
    """And two sides at a time, for their memory."""
    prepared, large, small = data("pretrain"), sides.SIZES["l24h1024a16"], sides.SIZES["h256"]
    rows = {size: [compare.batch_rows(prepared, size, is_baseline=b) for b in (True, False)] for size in (large, small)}
    assert rows[large] == [16, 16]
    assert list(compare._products("pretrain/grocery/x", large).values()) == ["product"]
    assert len(compare._products("pretrain/grocery/x", small)) == 2
    assert list(compare._products("discriminative/grocery/x", small)) == ["discriminative/grocery/x"]


def test_model_flops_count_candidates_in_the_tower_and_negatives_in_the_softmax():
    size = Size(2, 64, 4)
    layer = 4 * 64 * 64 + 3 * 64 * 192
    assert compare._model_flops(size, 0, 10.0, 3.0) == 6 * 2 * layer * 13
    assert compare._model_flops(size, 100, 10.0, 0.0) == 6 * (2 * layer * 10 + 100 * 64 * 10)


def test_rows_without_a_valid_split_are_no_news(monkeypatch):
    """But for that, warnings of the same place are seen, and that one after it."""
    logger, seen = logging.getLogger("gpsd_dist.assembly"), []
    monkeypatch.setattr(logger, "handle", lambda record: logger.filter(record) and seen.append(record.msg))
    with datasets.without_validation():
        logger.warning("%s has no valid rows: nothing is validated", "x")
        logger.warning("something else")
    logger.warning("%s has no valid rows: nothing is validated", "x")
    assert seen == ["something else", "%s has no valid rows: nothing is validated"]


def test_exponent_is_the_slope_of_a_power_law():
    assert growth.exponent([1, 10, 100], [3 * 10**-0.5, 3, 3 * 10**0.5]) == pytest.approx(0.5)
    assert 1.0 < growth.exponent([10, 160], [growth._tower_flops(n) for n in (10, 160)]) < 1.2


def test_names_of_a_suite():
    assert selected("frozen", "frozen/1m") == ("frozen/1m",) and len(selected("cpu", "all")) == 3 * 3 * 4
    with pytest.raises(ValueError, match="not benchmarks of suite 'growth'"):
        selected("growth", "pretrain/grocery/h64")


def test_markdown_has_a_line_per_row():
    table = Table("Title", ("name", "x"))
    table.add("a", "1")
    assert table.markdown() == "Title:\n\n| name | x |\n|---|--:|\n| a | 1 |"


def test_evaluation_counts_the_tokens_of_whole_passes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(remote.multiprocessing, "get_context", forked.context)
    prepared = data("discriminative")
    spec = SideSpec("product, evaluating - blocks", prepared, SIZE, 16, tmp_path / "run")
    with running({"one": spec}) as remotes:
        block = remotes["one"].block(2)
    assert block.num_tokens == 2 * prepared.manifest.split("train").num_history_tokens > 0
