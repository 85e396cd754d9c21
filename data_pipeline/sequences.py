"""Makes the rows of the contract from a cut log: encodes ids, collects each user's sequence, cuts histories."""

import dataclasses
import typing

import ibis
import ibis.expr.types as ir

from data_pipeline import canonical, hashing, splits, vocab
from data_pipeline.engine import Engine
from gpsd_dist import schema


def item_table(log: canonical.Log) -> str:
    """Names the vocabulary of the item feature."""
    return next(spec.feature().table for spec in log.features if spec.name == log.item_feature)


def occurrences(log: canonical.Log, cut: splits.Cut, min_count: int) -> dict[str, tuple[ir.Table, int]]:
    """Counts, per vocabulary table, the raw ids of the training period: (raw_id, count), and the table's min_count.

    `min_count` holds where the table's features ask for no other.
    """
    item_counts = _counts(cut.training_events, "item_id")
    if cut.training_exposures is not None and cut.counts_exposed_items:
        item_counts = item_counts.union(_counts(cut.training_exposures, "item_id"))
    users = cut.training_events.select("user_id")
    if cut.training_exposures is not None:
        users = users.union(cut.training_exposures.select("user_id"))
    users = users.distinct()
    by_table: dict[str, list[ir.Table]] = {}
    min_counts: dict[str, int] = {}
    for spec in log.features:
        if spec.kind != "categorical":
            continue
        parts = by_table.setdefault(spec.feature().table, [])
        parts += _occurrences_of(spec, log, cut, item_counts, users)
        min_counts[spec.feature().table] = min_count if spec.min_count is None else spec.min_count
        if spec.name == log.item_feature and log.all_items_known:
            parts.append(log.items.select(raw_id=log.items.item_id, count=ibis.literal(0, type="int64")))
            min_counts[spec.feature().table] = 0
    return {name: (_union(parts), min_counts[name]) for name, parts in by_table.items()}


def _occurrences_of(
    spec: canonical.FeatureSpec, log: canonical.Log, cut: splits.Cut, item_counts: ir.Table, users: ir.Table
):
    if spec.origin == "item_id":
        return [item_counts]
    if spec.origin == "items":
        counts = item_counts.group_by("raw_id").agg(count=item_counts["count"].cast("float64").sum().cast("int64"))
        joined = log.items.inner_join(counts, log.items.item_id == counts.raw_id)
        value = joined[spec.column].unnest() if spec.is_bag else joined[spec.column]
        return [joined.select(raw_id=value, count=joined["count"])]
    if spec.origin == "users":
        return [_counts(log.users.filter(log.users.user_id.isin(users.user_id)), spec.column)]
    parts = [_counts(cut.training_events, spec.column)] if "history" in spec.places else []
    if {"candidate", "context"} & set(spec.places):
        shown = cut.training_events if cut.training_exposures is None else cut.training_exposures
        parts.append(_counts(shown, spec.column))
    return parts


def _counts(table: ir.Table, column: str) -> ir.Table:
    return table.group_by(raw_id=table[column]).agg(count=table.count().cast("int64"))


def _union(parts: list[ir.Table]) -> ir.Table:
    first, *rest = [part.select("raw_id", "count") for part in parts]
    return first.union(*rest) if rest else first


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns raw columns into model columns with fixed vocabularies."""

    engine: Engine
    log: canonical.Log
    vocabs: dict[str, ir.Table]
    """Table -> vocabulary. A table that is not in it has none: its columns get 64-bit ids."""
    suffix: str = ""
    """Ends the names of tables that exist once per bucket of users."""

    def items(self) -> ir.Table:
        """Encodes every item of `Log.items` or the vocabulary: item_id, and `<feature>` for every item feature."""
        specs = [spec for spec in self.log.features if spec.origin in ("item_id", "items")]
        item_vocab = self.vocabs.get(item_table(self.log))
        attributes = self.log.items.rename(_key="item_id")
        ids = self.log.items.select("item_id")
        if item_vocab is not None:
            ids = ids.union(item_vocab.select(item_id=item_vocab.raw_id))
        ids = ids.distinct()
        table = ids.left_join(attributes, ids.item_id == attributes["_key"]).drop("_key")
        table = self.engine.materialise("items_raw", table)
        encoded = self.encode(table, [spec for spec in specs if not spec.is_bag], prefix="_")
        for spec in specs:
            if spec.is_bag:
                bags = vocab.encode_bag(table, "item_id", spec.column, self.vocabs.get(spec.feature().table))
                bags = self.engine.materialise(f"bags_{spec.name}", bags)
                joined = encoded.left_join(bags, encoded.item_id == bags["_key"])
                encoded = joined.select(encoded, **{f"_{spec.name}": ibis.coalesce(bags["_bag"], _default(spec))})
        columns = {spec.name: encoded[f"_{spec.name}"] for spec in specs}
        return self.engine.materialise("items_encoded", encoded.select("item_id", **columns))

    def users(self) -> ir.Table | None:
        """Encodes user_id and `<feature>` of every user feature; returns None where the log has none."""
        specs = [spec for spec in self.log.features if spec.origin == "users"]
        if not specs:
            return None
        encoded = self.encode(self.log.users, specs, prefix="_")
        columns = {spec.name: encoded[f"_{spec.name}"] for spec in specs}
        return self.engine.materialise("users_encoded", encoded.select("user_id", **columns))

    def attach(self, rows: ir.Table, items: ir.Table, place: str) -> ir.Table:
        """Adds `_<feature>` to `rows` (with item_id) for the features of `place`, but those of users; 1 if unknown."""
        specs = [spec for spec in self.log.specs_in(place) if spec.origin in ("item_id", "items")]
        found = items.select(_key=items.item_id, **{f"_{spec.name}": items[spec.name] for spec in specs})
        joined = rows.left_join(found, rows.item_id == found["_key"])
        filled = {
            f"_{spec.name}": hashing.id_of(rows.item_id)  # `Log.items` need not have the item
            if spec.origin == "item_id" and spec.feature().table not in self.vocabs
            else ibis.coalesce(found[f"_{spec.name}"], _default(spec))
            for spec in specs
        }
        table = joined.select(rows, **filled)
        own = [spec for spec in self.log.specs_in(place) if spec.origin in ("log", "counts")]
        return self.encode(table, own, prefix="_")

    def encode(self, table: ir.Table, specs: list[canonical.FeatureSpec], prefix: str) -> ir.Table:
        """Adds `<prefix><feature>` for every feature that is no bag.

        The value is an index, an id where the table has no vocabulary, or float64 with 0.0 for a missing number.
        """
        numbers = [spec for spec in specs if spec.kind == "numerical"]
        filled = {f"{prefix}{spec.name}": _number(table[spec.column]) for spec in numbers}
        categories = [spec for spec in specs if spec.kind == "categorical"]
        for spec in categories:
            if spec.feature().table not in self.vocabs:
                filled[f"{prefix}{spec.name}"] = hashing.id_of(table[spec.column])
        table = table.mutate(**filled) if filled else table
        words = {
            f"{prefix}{spec.name}": (spec.column, self.vocabs[spec.feature().table])
            for spec in categories
            if spec.feature().table in self.vocabs
        }
        return vocab.encode(table, words) if words else table


def _number(column: ir.FloatingValue) -> ir.FloatingValue:
    """Fills a missing value by 0.0, and turns -0.0 into 0.0, because Spark drops its sign where it compares rows."""
    is_zero = column.isnull() | (column == 0)
    return ibis.ifelse(is_zero, ibis.literal(0.0, type="float64"), column.cast("float64"))


def _default(spec: canonical.FeatureSpec) -> ir.Value:
    """Returns the value of a feature of an item or user that the log says nothing about."""
    if spec.kind == "numerical":
        return ibis.literal(0.0, type="float64")
    unknown = ibis.literal(schema.UNKNOWN_INDEX, type="int64")
    return ibis.array([unknown]) if spec.is_bag else unknown


def user_sequences(encoder: Encoder, events: ir.Table, items: ir.Table, limit: int) -> ir.Table:
    """Collects each user's events in blocks of `limit`: user_id, block, and `sequence`, an array of structs (rank,
    <history features>, time_s) in rank order.

    Block b holds the events of its own ranks and of those of the block before, so that the last `limit` events before
    any rank lie in one block. A request would otherwise be joined with all events of its user: for a user with n rows,
    n * n of them.
    """
    names = [spec.name for spec in encoder.log.specs_in("history")]
    encoded = encoder.engine.materialise(
        f"events_encoded{encoder.suffix}",
        encoder.attach(events, items, "history").select(
            "user_id", "rank", "num_events", "time_s", *[f"_{name}" for name in names]
        ),
    )
    own = encoded.mutate(block=(encoded["rank"] // limit).cast("int64"))
    again = own.filter(own.num_events > (own.block + 1) * limit).mutate(block=lambda t: t.block + 1)
    encoded = own.union(again)
    # `rank` comes first and is unique per user, so sorting the structs sorts by it. An ordered collect is not portable.
    token = ibis.struct(
        {"rank": encoded["rank"]} | {name: encoded[f"_{name}"] for name in names} | {"time_s": encoded.time_s}
    )
    collected = encoded.group_by("user_id", "block").agg(sequence=token.collect().sort())
    # A user has many requests and few blocks, and the hash costs as much as a request's history.
    return encoder.engine.materialise(
        f"sequences{encoder.suffix}", collected.mutate(user_hash=hashing.user_hash(collected.user_id))
    )


@dataclasses.dataclass(frozen=True)
class Rows:
    """Names what rows are made of: a cut log, with the raw ids that `Encoder` turns into indices."""

    log: canonical.Log
    events: ir.Table
    """Events with a rank and a `bucket`, of all users that have a row."""
    lengths: ir.Table
    """Pretraining rows, as `Cut.pretrain`."""
    candidates: ir.Table
    """Requests of every other split, as `Cut.candidates`."""
    num_buckets: int
    """Buckets of users that are worked on one after the other."""


def rows_in_buckets(
    encoder: Encoder, rows: Rows, items: ir.Table, max_history_length: int
) -> typing.Callable[[str], ir.Table]:
    """Makes all rows and stores them; returns a function from the name of a split to its rows.

    The sequences of one bucket of users exist at a time. A user's sequence is one aggregate, which engines hold in
    memory: buckets bound it, and do not change any row.
    """
    engine, users = encoder.engine, encoder.users()
    if rows.num_buckets > 1:  # each bucket reads them again
        rows = dataclasses.replace(rows, candidates=engine.stored("candidates", rows.candidates))
    for number in range(rows.num_buckets):
        part, here = encoder, rows
        if rows.num_buckets > 1:
            part = dataclasses.replace(encoder, suffix=f"_{number}")
            here = dataclasses.replace(
                rows,
                events=rows.events.filter(rows.events.bucket == number),
                lengths=_in_bucket(rows.lengths, number, rows.num_buckets),
                candidates=_in_bucket(rows.candidates, number, rows.num_buckets),
            )
        histories = user_sequences(part, here.events, items, max_history_length)
        made = {
            "rows_pretrain": pretrain_rows(part, here.lengths, histories, max_history_length),
            "rows_requests": request_rows(part, here.candidates, items, users, histories, max_history_length),
        }
        for name, table in made.items():
            if number == 0:
                engine.backend.create(name, table)
            else:
                engine.backend.append(name, table)
        for name in ("events_encoded", "sequences", *["candidates_encoded"] * bool(part.suffix)):
            engine.backend.drop(f"{name}{part.suffix}")
    pretrain, requests = engine.con.table("rows_pretrain"), engine.con.table("rows_requests")
    return lambda split: pretrain if split == "pretrain" else requests.filter(requests.split == split)


def _in_bucket(table: ir.Table, number: int, num_buckets: int) -> ir.Table:
    return table.filter(hashing.bucket(table.user_id, num_buckets) == number)


def pretrain_rows(encoder: Encoder, lengths: ir.Table, sequences: ir.Table, max_history_length: int) -> ir.Table:
    """Makes the rows of `pretrain` for users with at least 2 events in it, with a column `shuffle_key`."""
    long_enough = lengths.filter(lengths.num_events >= 2)
    rows = _with_history(encoder.log, long_enough, sequences, "num_events", max_history_length)
    return rows.mutate(shuffle_key=rows.user_id.concat(":pretrain").hexdigest("md5"))


def request_rows(
    encoder: Encoder,
    candidates: ir.Table,
    items: ir.Table,
    users: ir.Table | None,
    sequences: ir.Table,
    max_history_length: int,
) -> ir.Table:
    """Makes the rows of all other splits: contract columns plus `split` and `shuffle_key`."""
    log = encoder.log
    names = [spec.name for spec in log.specs_in("candidate")]
    shown = encoder.attach(candidates, items, "candidate")
    of_request = [spec for spec in log.specs_in("context") if spec.origin in ("log", "counts")]
    only_context = [spec for spec in of_request if spec.name not in names]
    shown = encoder.encode(shown, only_context, prefix="_")
    context_names = [spec.name for spec in of_request]
    columns = {name: shown[f"_{name}"] for name in dict.fromkeys([*names, *context_names])}
    columns |= {f"label_{task.name}": shown[task.name] for task in log.tasks} | {"time_s": shown.time_s}
    columns |= {f"sampling_{name}": shown[f"sampling_{name}"] for name in log.sampling}
    key = splits.request_key(candidates)
    shown = shown.select(*key, "position", **columns)
    if encoder.suffix:  # a large log: joins and windows leave the memory before requests are collected
        shown = encoder.engine.materialise(f"candidates_encoded{encoder.suffix}", shown)
    token = ibis.struct({"position": shown.position} | {name: shown[name] for name in columns})
    requests = shown.group_by(key).agg(shown=token.collect().sort())
    kept = (*key[1:], "shown")
    rows = _with_history(log, requests, sequences, "num_before", max_history_length, kept)
    rows = rows.mutate(
        request_time_s=rows.shown[0]["time_s"],
        **{f"candidate.{name}": _field(rows.shown, name) for name in names},
        **{f"context.{name}": rows.shown[0][name] for name in context_names},
        **{f"label.{task.name}": _field(rows.shown, f"label_{task.name}") for task in log.tasks},
        **{f"sampling.{name}": _field(rows.shown, f"sampling_{name}") for name in log.sampling},
    ).drop("shown")
    if users is not None:
        rows = _with_user_features(log, rows, users)
    words = [part for name in key[1:] for part in (":", rows[name].cast("string"))]
    return rows.mutate(shuffle_key=rows.user_id.concat(*words).hexdigest("md5")).drop(*key[2:])


def _with_history(
    log: canonical.Log, rows: ir.Table, sequences: ir.Table, until: str, limit: int, kept: tuple[str, ...] = ()
) -> ir.Table:
    """Adds the history columns: the user's first `rows[until]` events, cut to the last `limit` of them."""
    zero, size = ibis.literal(0, type="int64"), ibis.literal(limit, type="int64")
    block = (ibis.greatest(rows[until] - 1, zero) // size).cast("int64")
    rows = rows.select("user_id", *kept, _until=rows[until], _block=block)
    joined = rows.left_join(sequences, [rows.user_id == sequences.user_id, rows["_block"] == sequences.block])
    length = ibis.least(rows["_until"], size)
    end = rows["_until"] - ibis.greatest(rows["_block"] - 1, zero) * size
    sliced = joined.select(
        rows.user_id,
        *[rows[name] for name in kept],
        _length=length,
        _window=sequences.sequence[end - length : end],
        user_hash=ibis.coalesce(sequences.user_hash, hashing.user_hash(rows.user_id)),  # null without any event
    )
    columns = {
        f"history.{spec.name}": _field_or_empty(sliced["_window"], spec.name) for spec in log.specs_in("history")
    }
    columns["history.time_s"] = _field_or_empty(sliced["_window"], "time_s")
    return sliced.select("user_id", *kept, "user_hash", history_length=sliced["_length"], **columns)


def _field(tokens: ir.ArrayValue, name: str) -> ir.ArrayValue:
    return tokens.map(lambda token: token[name])


def _field_or_empty(tokens: ir.ArrayValue, name: str) -> ir.ArrayValue:
    values = _field(tokens, name)  # a user without any event has null
    return ibis.coalesce(values, ibis.literal([], type=values.type()))


def _with_user_features(log: canonical.Log, rows: ir.Table, users: ir.Table) -> ir.Table:
    specs = [spec for spec in log.specs_in("context") if spec.origin == "users"]
    joined = rows.left_join(users, rows.user_id == users.user_id)
    filled = {f"context.{spec.name}": ibis.coalesce(users[spec.name], _default(spec)) for spec in specs}
    return joined.select(rows, **filled)


def item_rows(encoder: Encoder, items: ir.Table) -> ir.Table:
    """Selects `index` and the encoded attributes of every known item, under the names of the features."""
    attributes = [spec.name for spec in encoder.log.features if spec.origin == "items"]
    known = items.filter(items[encoder.log.item_feature] > schema.UNKNOWN_INDEX)
    return known.select(*attributes, index=known[encoder.log.item_feature]).order_by("index")
