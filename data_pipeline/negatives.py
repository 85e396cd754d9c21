"""Draws negatives for logs without labels, by hashes: the same ones on every engine and for every partitioning.

A request of `train` draws from the items of the training period, one of `valid` or `test` from all items of the log,
whether the vocabulary knows them or not. Drawn from the known items alone, no negative were ever index 1 (unknown), and
a positive that is - a new item, or with --min_count a rare one - would give its label away.

Draw d of a request is md5(seed, user, num_before, d) read as an integer modulo a number of slots; slots are allotted to
items (one each for "uniform"; by training count, at least one each, for "popularity") and found by an equality join. A
draw of the positive, of an item of the user's whole history before the request, or of an item already drawn is thrown
away and the next draw takes its place, which is exact rejection sampling.
"""

import ibis
import ibis.expr.types as ir

from data_pipeline import canonical, hashing, vocab
from data_pipeline.engine import Engine
from data_pipeline.options import BuildOptions, Negatives

POPULARITY_SLOTS = (
    1 << 20
)  # resolution of the popularity distribution: shares below one in a million are rounded up to it
DRAW_DIGITS = 13  # 52 bits: modulo a billion slots, the bias is below 1e-6
MAX_ROUNDS = 6
SPARE_DRAWS = 2


def slots(engine: Engine, pool: ir.Table, distribution: Negatives, period: str = "train") -> tuple[ir.Table, int]:
    """Allots slots to the items in `pool` (raw_id, index, count, as `vocab.build` makes it).

    Returns (table of slot -> item_id, number of slots). `period` is part of a table's name.
    """
    if distribution == "uniform":
        width = ibis.literal(1, type="int64")
    else:
        total = int(pool["count"].sum().execute())
        share = (pool["count"].cast("float64") * (POPULARITY_SLOTS / total)).round().cast("int64")
        width = ibis.greatest(share, ibis.literal(1, type="int64"))
    widths = pool.select("index", item_id=pool.raw_id, width=width)
    up_to_here = ibis.window(order_by=widths["index"], preceding=None, following=0)
    # DuckDB sums int64 to HUGEINT. Ibis does not know this and would drop a cast back to int64, so the sum is float64,
    # which is exact below 2^53.
    until = widths.width.cast("float64").sum().over(up_to_here).cast("int64")
    spans = widths.mutate(until=until)
    # The range starts at 0, because Ibis 12 loses the parentheses of a difference as the start of a range on Spark.
    places = ibis.range(ibis.literal(0, type="int64"), spans.width).map(lambda place: spans.until - spans.width + place)
    filled = spans.select("item_id", slot=places.unnest())
    table = engine.materialise(f"negative_slots_{period}", filled)
    return table, int(table.count().execute())


def draw(
    engine: Engine,
    positives: ir.Table,
    events: ir.Table,
    slot_table: ir.Table,
    *,
    num_slots: int,
    per_positive: int,
    seed: int,
    period: str = "train",
):
    """Draws the negatives of all requests: REQUEST_KEY, position (1 ... per_positive), item_id, time_s.

    `positives`: one row per request with its item_id. Returns (table, number of requests that got fewer than
    per_positive negatives because the user has seen nearly every item).
    """
    seen = events.group_by(["user_id", "item_id"]).agg(first_rank=events["rank"].min())
    requests = engine.materialise(
        f"negative_requests_{period}", positives.select("user_id", "split", "num_before", "item_id", "time_s")
    )
    wanted, first_draw, accepted = requests, 0, None
    for round_number in range(MAX_ROUNDS):
        num_draws = (per_positive + SPARE_DRAWS) << round_number
        drawn = _round(wanted, slot_table, num_slots, range(first_draw, first_draw + num_draws), seed)
        fresh = _reject(drawn, seen)
        accepted = fresh if accepted is None else accepted.union(fresh)
        in_draw_order = ibis.window(group_by=["user_id", "split", "num_before", "item_id"], order_by=accepted.draw)
        accepted = engine.materialise(
            f"negatives_{period}_round_{round_number}",
            accepted.mutate(repeat=ibis.row_number().over(in_draw_order)).filter(ibis._.repeat == 0).drop("repeat"),
        )
        counts = accepted.group_by(["user_id", "split", "num_before"]).agg(num=accepted.count())
        counted = requests.left_join(counts, ["user_id", "split", "num_before"]).drop(
            "split_right", "num_before_right", "user_id_right"
        )
        wanted = engine.materialise(
            f"negatives_{period}_wanted_{round_number}",
            counted.filter(ibis.coalesce(counted.num, 0) < per_positive).drop("num"),
        )
        first_draw += num_draws
        num_short = int(wanted.count().execute())
        if num_short == 0:
            break
    by_draw = ibis.window(group_by=["user_id", "split", "num_before"], order_by=accepted.draw)
    placed = accepted.mutate(position=(ibis.row_number().over(by_draw) + 1).cast("int64"))
    return placed.filter(placed.position <= per_positive).drop("draw"), num_short


def _round(requests: ir.Table, slot_table: ir.Table, num_slots: int, draws: range, seed: int) -> ir.Table:
    """Makes all draws of one round: REQUEST_KEY, positive_id, time_s, draw, item_id."""
    numbered = requests.mutate(draw=_draw_numbers(draws).unnest())
    text = numbered.user_id.concat(
        ":", numbered.num_before.cast("string"), ":", numbered.draw.cast("string"), f":{seed}"
    )
    slot = hashing.digits_to_int(text.hexdigest("md5"), 0, DRAW_DIGITS) % num_slots
    keyed = numbered.rename(positive_id="item_id").mutate(slot=slot.cast("int64"))
    return keyed.inner_join(slot_table, "slot").drop("slot")


def _draw_numbers(draws: range) -> ir.ArrayValue:
    """Returns the numbers of `draws` as a typed array, because Spark cannot cast what it unnests."""
    return ibis.range(ibis.literal(draws.start, type="int64"), ibis.literal(draws.stop, type="int64"))


def _reject(drawn: ir.Table, seen: ir.Table) -> ir.Table:
    """Removes draws of the positive and of items that the user met before the request."""
    met = seen.rename(seen_user="user_id", seen_item="item_id")
    joined = drawn.left_join(met, [drawn.user_id == met.seen_user, drawn.item_id == met.seen_item])
    is_new = joined.first_rank.isnull() | (joined.first_rank >= joined.num_before)
    return joined.filter(is_new & (joined.item_id != joined.positive_id)).drop(
        "seen_user", "seen_item", "first_rank", "positive_id"
    )


def add(
    engine: Engine, log: canonical.Log, candidates: ir.Table, events: ir.Table, counts: ir.Table, options: BuildOptions
) -> tuple[ir.Table, dict]:
    """Adds options.num_negatives drawn candidates to each of `candidates` (positives only); also counts what is short.

    `counts`: raw_id and count of the items of the training period, whatever --min_count says.
    """
    zero = ibis.literal(0, type="int64")
    all_items = counts.union(events.select(raw_id=events.item_id).distinct().mutate(count=zero))
    is_train = candidates.split == "train"
    drawn_parts, num_short = [], 0
    for period, positives, items in (
        ("train", candidates.filter(is_train), counts),
        ("later", candidates.filter(~is_train), all_items),
    ):
        pool = vocab.build(engine, f"drawn_{period}", items, 0)
        slot_table, num_slots = slots(engine, pool, options.negatives, period)
        drawn, short = draw(
            engine,
            positives,
            events,
            slot_table,
            num_slots=num_slots,
            per_positive=options.num_negatives,
            seed=options.seed,
            period=period,
        )
        drawn_parts.append(drawn)
        num_short += short
    drawn = drawn_parts[0].union(*drawn_parts[1:])
    missing = {name: ibis.null(kind) for name, kind in candidates.schema().items() if name not in drawn.columns}
    labels = {task.name: ibis.literal(0.0, type="float64") for task in log.tasks}
    filled = drawn.mutate(**(missing | labels)).select(*candidates.columns)
    both = engine.materialise("candidates_all", candidates.union(filled))
    reason = f"requests with fewer than {options.num_negatives} negatives (the user has met nearly every item)"
    return both, {reason: num_short} if num_short else {}
