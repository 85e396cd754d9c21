"""Applies split rules: which rows of the log are requests, of which split, and what the training period is.

A request is keyed by (user_id, split, num_before): num_before is the number of the user's events that form its history.
Exposures that see the same history and lie in the same split are consecutive in time, so they are one request.
"""

import dataclasses
import math

import ibis
import ibis.expr.types as ir

from data_pipeline import canonical, hashing
from data_pipeline.engine import Engine

EVENTS_PER_BUCKET = 5_000_000  # untuned; what it costs in memory: README.md, "Larger than memory"
REQUEST_KEY = ("user_id", "split", "num_before")
REQUEST_DAY = "__request_day"
"""Column of candidates under --daily_requests: the UTC day, which belongs to the key then. No feature has that name."""
DAY_S = 86_400


@dataclasses.dataclass(frozen=True)
class Cut:
    """Holds what a split rule makes of a log."""

    candidates: ir.Table
    """REQUEST_KEY, position (0, 1, ...), item_id, time_s, one column per task, the "log" columns of candidate and
    context."""
    pretrain: ir.Table
    """user_id, num_events: a pretraining row holds the user's first `num_events` events."""
    training_events: ir.Table
    training_exposures: ir.Table | None
    counts_exposed_items: bool
    """True: exposed items count as occurrences for the vocabulary (official Grocery negatives do not)."""
    words: str
    skipped: dict[str, int]


def request_key(candidates: ir.Table) -> list[str]:
    """Names the columns that tell the requests of `candidates` apart."""
    return [*REQUEST_KEY, *(name for name in candidates.columns if name == REQUEST_DAY)]


def num_buckets(log: canonical.Log, asked: int) -> int:
    """Returns the number of buckets of users to work on one after the other; 0 asks for as many as the log needs."""
    return asked or math.ceil(log.events.count().execute() / EVENTS_PER_BUCKET) or 1


def boundaries(log: canonical.Log) -> list[int]:
    """Lists valid_from, test_from and test_until (epoch s) of a log that is cut by time.

    Without an end, the test period ends with the last exposure.
    """
    until_s = log.split.test_until_s
    if until_s is None:  # not of the last request: a request has the time of its first exposure
        until_s = int(log.exposures.time_s.max().execute()) + 1
    return [log.split.valid_from_s, log.split.test_from_s, until_s]


def number_events(engine: Engine, log: canonical.Log, num_buckets: int = 1) -> ir.Table:
    """Numbers each user's events: adds known_s, num_events, bucket, and rank 0, 1, ... in the user's order.

    The order is by (known time, order, item id). One bucket of users is in work at a time.
    """
    events = log.events.mutate(known_s=canonical.known_time_s(log.events), bucket=ibis.literal(0, type="int64"))
    if num_buckets > 1:
        bucket = hashing.bucket(events.user_id, num_buckets)
        events = engine.materialise("events_in_buckets", events.mutate(bucket=bucket))
    parts = (events.filter(events.bucket == bucket) for bucket in range(num_buckets))
    stored = engine.materialise_parts("events", (_numbered(part) for part in parts))
    if num_buckets > 1:
        engine.backend.drop("events_in_buckets")
    return stored


def _numbered(events: ir.Table) -> ir.Table:
    in_order = ibis.window(group_by="user_id", order_by=[events.known_s, events.order, events.item_id])
    return events.mutate(
        rank=ibis.row_number().over(in_order).cast("int64"),
        num_events=events.count().over(ibis.window(group_by="user_id")).cast("int64"),
    )


def cut(engine: Engine, log: canonical.Log, events: ir.Table, is_holdout: bool, by_day: bool = False) -> Cut:
    """Applies the log's split rule to numbered events.

    `is_holdout`: makes the requests after the test period instead of those before. `by_day`: no request reaches over
    midnight (UTC); under the other rules none does, as all candidates of a request are of one time.
    """
    if isinstance(log.split, canonical.TimeBoundaries):
        return _cut_by_time(engine, log, events, is_holdout, by_day)
    if is_holdout:
        raise ValueError("--split holdout needs a source that is cut by time; this one is not")
    if isinstance(log.split, canonical.LeaveLastOut):
        return _cut_leave_last_out(engine, log, events)
    return _cut_last_item(engine, log, events)


def _cut_by_time(engine: Engine, log: canonical.Log, events: ir.Table, is_holdout: bool, by_day: bool) -> Cut:
    rule = log.split
    exposures = engine.stored("exposures", log.exposures)
    if is_holdout and rule.test_until_s is None:
        raise ValueError(
            "--split holdout scores what lies after the test period, and the split rule of this log has no end of it; "
            "set it (test_until in the TOML file of --source generic) and build the data set again"
        )
    split = ibis.cases(
        (exposures.time_s < rule.valid_from_s, "train"), (exposures.time_s < rule.test_from_s, "valid"), else_="test"
    )
    if rule.test_until_s is not None:
        split = ibis.cases((exposures.time_s >= rule.test_until_s, "holdout"), else_=split)
    labelled = exposures.mutate(split=split)
    is_used = labelled.split == "holdout" if is_holdout else labelled.split != "holdout"
    used = labelled.filter(is_used)
    counts = labelled.agg(used=is_used.sum().fill_null(0), every=labelled.count()).execute().iloc[0]
    num_other = int(counts["every"]) - int(counts["used"])
    if is_holdout and not counts["used"]:
        raise ValueError(
            f"no exposure lies at or after {rule.test_until_s} (epoch s), the end of the test period; --split holdout "
            "needs a later log"
        )
    reason = (
        "exposures before the holdout period (used as history only)"
        if is_holdout
        else "exposures after the test period"
    )
    counted = _count_earlier_events(engine, events, used)
    if by_day:
        counted = counted.mutate(**{REQUEST_DAY: (counted.time_s // DAY_S).cast("int64")})
    in_order = ibis.window(group_by=request_key(counted), order_by=[counted.time_s, counted.order, counted.item_id])
    candidates = counted.mutate(position=ibis.row_number().over(in_order).cast("int64"))
    until_s = rule.valid_from_s if rule.pretrain_until_s is None else rule.pretrain_until_s
    early = events.filter(events.known_s < until_s)
    return Cut(
        candidates=candidates,
        pretrain=early.group_by("user_id").agg(num_events=early.count().cast("int64")),
        training_events=events.filter(events.known_s < rule.valid_from_s),
        training_exposures=labelled.filter(labelled.split == "train"),
        counts_exposed_items=True,
        words=rule.words
        or f"train < {rule.valid_from_s} <= valid < {rule.test_from_s} <= test < {rule.test_until_s} (epoch s)",
        skipped={reason: num_other} if num_other else {},
    )


def _count_earlier_events(engine: Engine, events: ir.Table, exposures: ir.Table) -> ir.Table:
    """Adds num_before: the user's events strictly earlier (in whole seconds) than the exposure."""
    if engine.name == "duckdb":  # Spark has no such join
        ranked = events.group_by("user_id", moment_s=events.known_s).agg(last=events["rank"].max())
        joined = exposures.asof_join(ranked, on=exposures.time_s > ranked.moment_s, predicates="user_id")
        return joined.select(exposures, num_before=ibis.coalesce(ranked["last"] + 1, ibis.literal(0, type="int64")))
    # The sum is float64, exact below 2^53: DuckDB sums int64 to HUGEINT, and Ibis would drop a cast back to int64.
    one, zero = ibis.literal(1.0), ibis.literal(0.0)
    moments = events.select("user_id", moment_s=events.known_s, num=one).union(
        exposures.select("user_id", moment_s=exposures.time_s, num=zero)
    )
    per_moment = moments.group_by(["user_id", "moment_s"]).agg(num=moments.num.sum())
    so_far = ibis.window(group_by="user_id", order_by=per_moment.moment_s, preceding=None, following=0)
    earlier = per_moment.select(
        "user_id", "moment_s", num_before=(per_moment.num.sum().over(so_far) - per_moment.num).cast("int64")
    )
    joined = exposures.inner_join(earlier, [exposures.user_id == earlier.user_id, exposures.time_s == earlier.moment_s])
    return joined.select(exposures, earlier.num_before)


def _cut_last_item(engine: Engine, log: canonical.Log, events: ir.Table) -> Cut:
    """Makes one request per user, whose target is the last event; the log gives the split, or the last times do."""
    rule = log.split
    last = engine.materialise(
        "targets", events.filter((events["rank"] == events.num_events - 1) & (events.num_events >= 2))
    )
    num_short = events.filter(events.num_events < 2).count().execute()
    if isinstance(rule, canonical.Given):
        sides = log.exposures.select("user_id", side=log.exposures.split).distinct()
        words = "train / test as given by the source"
    else:
        num_users = last.count().execute()
        place = min(max(math.ceil(rule.train_quantile * num_users), 1), num_users)
        boundary_s = int(last.order_by("known_s").limit(1, offset=place - 1).known_s.execute().iloc[0])
        sides = last.select("user_id", side=ibis.cases((last.known_s <= boundary_s, "train"), else_="test"))
        words = (
            f"users whose last event is at or before {boundary_s} (epoch s, the {rule.train_quantile} quantile) train, "
            "others test"
        )
    timed = engine.materialise(
        "users_split", last.select("user_id", "known_s", "num_events").inner_join(sides, "user_id")
    )
    split = _carve_valid(engine, timed, rule.valid_fraction)
    if isinstance(rule, canonical.Given):
        candidates = _given_candidates(log, split)
        if candidates.count().execute() != log.exposures.count().execute():
            raise ValueError("some users of the given samples have fewer than 2 events, so that they have no history")
    else:
        candidates = _positives(log, last, split.select("user_id", "split"))
    trains = split.filter(split.split == "train").select("user_id")
    is_training = (events["rank"] < events.num_events - 1) | events.user_id.isin(trains.user_id)
    exposures = log.exposures
    return Cut(
        candidates=engine.materialise("candidates", candidates),
        pretrain=last.select("user_id", num_events=last.num_events - 1),
        training_events=events.filter(is_training & (events.num_events >= 2)),
        training_exposures=None if exposures is None else exposures.filter(exposures.user_id.isin(trains.user_id)),
        counts_exposed_items=False,
        words=f"one request per user, target = last event; {words}; valid = latest {rule.valid_fraction} of the train "
        "users by "
        "(last time, user_hash); pretraining = everything but the last event of every user",
        skipped={"events of users with fewer than 2 events": int(num_short)} if num_short else {},
    )


def _carve_valid(engine: Engine, timed: ir.Table, fraction: float) -> ir.Table:
    """Makes the latest `fraction` of the train users valid: user_id, num_before, time_s, split. Ties: by user hash."""
    num_valid = math.floor(fraction * timed.filter(timed.side == "train").count().execute())
    hashed = timed.mutate(tie=timed.user_id.hexdigest("md5"))
    latest_first = ibis.window(group_by="side", order_by=[hashed.known_s.desc(), hashed.tie, hashed.user_id])
    placed = hashed.mutate(place=ibis.row_number().over(latest_first))
    split = ibis.cases(((placed.side == "train") & (placed.place < num_valid), "valid"), else_=placed.side)
    return engine.materialise(
        "requests_split",
        placed.select("user_id", split=split, num_before=placed.num_events - 1, request_s=placed.known_s),
    )


def _given_candidates(log: canonical.Log, split: ir.Table) -> ir.Table:
    exposures = log.exposures.drop("split")
    joined = exposures.inner_join(split, "user_id")
    in_order = ibis.window(group_by="user_id", order_by=[joined.time_s, joined.order])
    return joined.mutate(position=ibis.row_number().over(in_order).cast("int64")).drop("request_s")


def _positives(log: canonical.Log, targets: ir.Table, split: ir.Table) -> ir.Table:
    """Makes target events the candidate at position 0 with label 1 for every task; what ranks before is history."""
    joined = targets.inner_join(split, "user_id")
    kept = ["user_id", "split", "item_id", "order", *[s.name for s in log.specs_in("context") if s.origin == "log"]]
    labels = {task.name: ibis.literal(1.0, type="float64") for task in log.tasks}
    return joined.select(
        *kept, num_before=joined["rank"], time_s=joined.known_s, position=ibis.literal(0, type="int64"), **labels
    )


def _cut_leave_last_out(engine: Engine, log: canonical.Log, events: ir.Table) -> Cut:
    names = ("test", "valid", "train") if log.split.has_valid else ("test", "train")
    num_kept_out = len(names) - 1  # the last events of a user, which nobody trains on
    from_end = events.num_events - 1 - events["rank"]  # 0 = last event
    is_long = events.num_events > num_kept_out
    split = ibis.cases(*[(from_end == place, name) for place, name in enumerate(names[:-1])], else_=names[-1])
    is_target = (from_end <= num_kept_out) & (events["rank"] >= 1) & is_long
    targets = engine.materialise("targets", events.filter(is_target).mutate(split=split.name("split")))
    kept = ["user_id", "split", "item_id", "order", *[s.name for s in log.specs_in("context") if s.origin == "log"]]
    labels = {task.name: ibis.literal(1.0, type="float64") for task in log.tasks}
    candidates = targets.select(
        *kept, num_before=targets["rank"], time_s=targets.known_s, position=ibis.literal(0, type="int64"), **labels
    )
    # A pretraining row needs two events: one to read and one to predict.
    long_enough = events.filter(events.num_events >= num_kept_out + 2)
    lengths = long_enough.group_by("user_id").agg(num_events=long_enough.num_events.max() - num_kept_out)
    num_shortest = num_kept_out + 1
    shortest = events.filter((events.num_events == num_shortest) & (events["rank"] == 0))
    skipped = {
        f"events of users with fewer than {num_shortest} events": int(events.filter(~is_long).count().execute()),
        f"users with exactly {num_shortest} events (no train request: its history would be empty)": int(
            shortest.count().execute()
        ),
    }
    words = "test = last event, valid = second last, train = third last; pretraining = everything but the last two"
    if not log.split.has_valid:
        words = "test = last event, train = second last, no valid; pretraining = everything but the last"
    return Cut(
        candidates=engine.materialise("candidates", candidates),
        pretrain=lengths,
        training_events=events.filter((from_end >= num_kept_out) & is_long),
        training_exposures=None,
        counts_exposed_items=False,
        words=f"per user: {words}",
        skipped={reason: num for reason, num in skipped.items() if num},
    )
