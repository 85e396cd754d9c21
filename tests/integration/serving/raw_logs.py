"""Reads raw logs into raw requests, by the standard library and Arrow, and by nothing of the package.

The replay tests hold the package's own way from raw values to tokens against these readers, one per kind of log. A
reader yields (split, user, request) with every event of the user that a client could send, in the order of the log.
"""

import ast
import collections
import csv
import datetime
import gzip
import itertools
import json
import math
import pathlib
import tomllib
import typing
import zoneinfo

import pyarrow.parquet as pq

Sample = tuple[str, str, dict]
UTC8_S, DAY_S, APR_25_S = 8 * 3600, 86400, 1650816000


def described(raw: pathlib.Path) -> typing.Iterator[Sample]:
    """Any log with a schema.toml, such as the synthetic shop: [history], [exposure], [items], [users]."""
    schema = tomllib.loads((raw / "schema.toml").read_text())
    history, exposure, zone = schema["history"], schema["exposure"], zoneinfo.ZoneInfo(schema["split"]["time_zone"])

    def seconds(section: dict, row: dict) -> float:
        value, unit = row[section["time"]], section.get("time_unit", "s")
        if unit == "iso":
            moment = datetime.datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).timestamp()
        return int(value) / {"s": 1, "ms": 1000}[unit]

    events, shown = collections.defaultdict(list), collections.defaultdict(list)
    for row in _rows(raw, history):
        kind = row[history["event"]]
        if row[history["user"]] is not None and kind in history.get("event_types", [kind]):
            entry = {"item": row[history["item"]], "time_s": seconds(history, row)}
            events[row[history["user"]]].append(entry | _features(history, row))
    first_s: dict[tuple, float] = {}
    for row in _rows(raw, exposure):
        key = (row[exposure["user"]], row[exposure["request"]])
        first_s[key] = min(seconds(exposure, row), first_s.get(key, math.inf))
    for row in _rows(raw, exposure):
        user, item = row[exposure["user"]], row[exposure["item"]]
        time_s = first_s[user, row[exposure["request"]]]
        if exposure.get("extends_history") and row[exposure["extends_history"]] == 1:
            events[user].append({"item": item, "time_s": time_s, **_features(history, {})})
        shown[user].append((time_s, {"item": item} | _features(exposure, row)))
    attributes = {row[schema["items"]["item"]]: _features(schema["items"], row) for row in _rows(raw, schema["items"])}
    profiles = {row[schema["users"]["user"]]: _features(schema["users"], row) for row in _rows(raw, schema["users"])}
    in_context = {f.get("name", f["column"]) for f in exposure["feature"] if f["place"] == "context"}
    days = [schema["split"][name] for name in ("valid_from", "test_from")]
    bounds = [datetime.datetime.combine(day, datetime.time(), zone).timestamp() for day in days]
    for user, candidates in shown.items():
        parts = collections.defaultdict(list)
        for time_s, entry in sorted(candidates, key=lambda found: math.floor(found[0])):
            split = ("train", "valid", "test")[sum(time_s >= bound for bound in bounds)]
            num_before = sum(math.floor(event["time_s"]) < math.floor(time_s) for event in events[user])
            parts[split, num_before].append((time_s, entry))
        for (split, _), part in parts.items():
            context = profiles.get(user, _features(schema["users"], {})) | {
                name: part[0][1][name] for name in in_context
            }
            entries = [{name: entry[name] for name in entry if name not in in_context} for _, entry in part]
            made = request(user, part[0][0], events[user], entries, attributes, context)
            yield split, user, {f"history.{name}": [] for name in _features(history, {})} | made


def _rows(raw: pathlib.Path, section: dict) -> typing.Iterator[dict]:
    for path in sorted(raw.glob(section["files"])):
        if path.suffix == ".csv":
            rows = list(csv.DictReader(path.open()))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.open()]
        else:
            rows = pq.read_table(path).to_pylist()
        yield from ({name: None if value == "" else value for name, value in row.items()} for row in rows)


def _features(section: dict, row: dict) -> dict:
    found = {}
    for feature in section.get("feature", []):
        value, kind = row.get(feature["column"]), feature.get("kind")
        if value is not None and kind:
            value = float(value) if kind == "numerical" else value.split(feature["separator"])
        found[feature.get("name", feature["column"])] = value
    return found


def request(user: str, time_s: float, events: list, candidates: list, attributes: dict, context: dict) -> dict:
    """A raw request, with the attributes of all its items: those that the artefact does not know must be taken."""
    made = {"user_id": user, "request_time_s": time_s} | {f"context.{name}": context[name] for name in context}
    names = sorted({name for found in attributes.values() for name in found})
    for place, entries in (("history", events), ("candidate", candidates)):
        fields = ["item", "time_s"] if place == "history" else ["item"]
        for name in dict.fromkeys([*fields, *(name for entry in entries for name in entry)]):
            made[f"{place}.{name}"] = [entry.get(name) for entry in entries]
        for name in names:
            made[f"{place}.{name}"] = [attributes.get(entry["item"], {}).get(name) for entry in entries]
    return made


def last_events(sequences: dict[str, list], attributes: dict, names: tuple[str, ...]) -> typing.Iterator[Sample]:
    """One request for each of a user's last events, in the splits `names`, counted from the end.

    Its candidate is the event; the client sends what lies before it, in the order of the lines.
    """
    for user, events in sequences.items():
        events = sorted(events, key=lambda event: event["time_s"])
        if len(events) < len(names):
            continue
        for number, split in enumerate(names, start=1):
            if len(events) > number:
                target, past = events[-number], events[:-number]
                made = request(user, target["time_s"], past, [{"item": target["item"]}], attributes, {})
                yield split, user, made


def movielens(raw: pathlib.Path) -> typing.Iterator[Sample]:
    """ratings.dat and movies.dat, parted by "::"; leave the last out."""
    genres = {}
    for line in (raw / "movies.dat").read_text(encoding="utf-8").split("\n"):
        if line.strip():
            fields = line.split("::")
            genres[fields[0]] = {"genres": [genre for genre in fields[-1].split("|") if genre]}
    sequences = collections.defaultdict(list)
    for line in (raw / "ratings.dat").open():
        user, movie, _, time_s = line.strip().split("::")
        sequences[user].append({"item": movie, "time_s": int(time_s)})
    yield from last_events(sequences, genres, ("test", "valid", "train"))


def taobao(raw: pathlib.Path) -> typing.Iterator[Sample]:
    """UserBehavior.csv: user, item, category, behaviour, epoch s; nine days, equal rows once."""
    first_s = 1_511_539_200
    sequences, categories = collections.defaultdict(list), {}
    rows = dict.fromkeys(map(tuple, csv.reader((raw / "UserBehavior.csv").open())))
    for user, item, category, behaviour, time_s in rows:
        if first_s <= int(time_s) < first_s + 9 * DAY_S:
            sequences[user].append({"item": item, "time_s": int(time_s), "behaviour": behaviour})
            categories[item] = min(category, categories.get(item, category))
    attributes = {item: {"category": category} for item, category in categories.items()}
    yield from last_events(sequences, attributes, ("last",))


def amazon_reviews(raw: pathlib.Path) -> typing.Iterator[Sample]:
    """Reviews and metadata as JSON lines or Python literals, gzipped."""
    sequences, attributes = collections.defaultdict(list), {}
    reviews, meta = (gzip.decompress(next(raw.glob(name)).read_bytes()) for name in ("reviews*.gz", "meta*.gz"))
    rows = [json.loads(line) for line in reviews.decode().splitlines()]
    names = ("reviewerID", "asin", "unixReviewTime")
    for user, item, time_s in dict.fromkeys(tuple(row.get(name) for name in names) for row in rows):
        if user is not None:
            sequences[user].append({"item": item, "time_s": time_s})
    for line in meta.decode().splitlines():
        product = ast.literal_eval(line)
        path = [name for part in product["categories"] for name in part]
        entry = {"category": path[-1] if path else None, "brand": product.get("brand"), "categories": sorted(set(path))}
        attributes.setdefault(product["asin"], entry)
    yield from last_events(sequences, attributes, ("last",))


def amazon_grocery(raw: pathlib.Path) -> typing.Iterator[Sample]:
    """interactions.csv and samples.csv: one request per user with two candidates."""
    sequences, categories = collections.defaultdict(list), collections.defaultdict(list)
    for row in csv.DictReader((raw / "interactions.csv").open()):
        sequences[row["user"]].append({"item": row["item"], "time_s": int(row["timestamp"])})
        categories[row["item"]].append(row["cate"])
    samples = list(csv.DictReader((raw / "samples.csv").open()))
    for row in samples:
        for side in ("target", "negative"):
            categories[row[side]].append(row[f"{side}_cate"])
    attributes = {item: {"category": min(found)} for item, found in categories.items()}
    for row in samples:
        events = sorted(sequences[row["user"]], key=lambda event: event["time_s"])
        shown = [{"item": row["target"]}, {"item": row["negative"]}]
        yield "last", row["user"], request(row["user"], events[-1]["time_s"], events[:-1], shown, attributes, {})


def kuairand(raw: pathlib.Path) -> typing.Iterator[Sample]:
    """KuaiRand-Pure: histories without times, labelled exposures, and counts of the days before."""
    log: dict[tuple, tuple] = {}
    for row in pq.read_table(next(raw.glob("log_standard*.parquet"))).to_pylist():
        if row["date"] >= 20220425:
            key = (str(row["user_id"]), str(row["video_id"]), row["time_ms"])
            log[key] = max(log.get(key, (-1, 0, 0)), (row["is_click"], row["long_view"], -row["tab"]))
    past = pq.read_table(raw / "user_histories_until_apr24.parquet").to_pylist()
    histories = {str(row["user_id"]): row for row in past}
    attributes, profile, counts = _videos(raw, past), _profiles(raw, histories), _daily_counts(log)
    shown, events = collections.defaultdict(list), collections.defaultdict(list)
    for user, row in histories.items():
        for video in row["watch_seq"]:
            behaviour = "long_view" if video in row["long_watch_seq"] else "watch"
            latest_s = row["last_time_ms"] / 1000
            events[user].append({"item": str(video), "time_s": None, "latest_s": latest_s, "behaviour": behaviour})
    in_order = sorted(log.items(), key=lambda entry: (entry[0][2], entry[0][1]))  # by time, then by video
    for (user, video, time_ms), (click, long_view, tab) in in_order:
        entry = {"item": video, "tab": str(-tab), "hour": str((time_ms // 1000 + UTC8_S) // 3600 % 24)}
        day = (time_ms // 1000 + UTC8_S) // DAY_S
        shown[user].append((time_ms, entry | counts("item", video, day), counts("user", user, day)))
        if click:
            behaviour = "long_view" if long_view else "watch"
            events[user].append({"item": video, "time_s": time_ms / 1000, "latest_s": None, "behaviour": behaviour})
    for user, found in shown.items():
        parts = collections.defaultdict(list)
        known = [event["latest_s"] if event["time_s"] is None else event["time_s"] for event in events[user]]
        for time_ms, entry, of_user in found:
            days = (time_ms // 1000 - APR_25_S) // DAY_S
            split = "train" if days < 4 else {4: "valid", 5: "test"}.get(days, "holdout")
            num_before = sum(math.floor(moment) < time_ms // 1000 for moment in known)
            parts[split, num_before].append((time_ms, entry, of_user))
        for (split, _), part in parts.items():
            entries, context = [entry for _, entry, _ in part], profile(user) | part[0][2]
            made = request(user, part[0][0] / 1000, events[user], entries, attributes, context)
            del made["history.log_watches"], made["history.long_watch_ratio"]  # inputs of candidates only
            yield split, user, {"history.behaviour": []} | made


def _videos(raw: pathlib.Path, histories: list[dict]) -> dict:
    names = ("watch_seq", "long_watch_seq")
    watched, viewed = (collections.Counter(str(video) for row in histories for video in row[name]) for name in names)
    edges, found = (0, 7, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300, 600), {}
    for row in csv.DictReader((raw / "video_features_basic_pure.csv").open()):
        video, bucket = row["video_id"], None
        if row["video_duration"]:
            seconds = float(row["video_duration"]) / 1000
            fitting = [f"{low}-{high}s" for low, high in itertools.pairwise(edges) if seconds < high]
            bucket = fitting[0] if fitting else f"{edges[-1]}s-"
        found[video] = {
            "author": row["author_id"] or None,
            "tag": row["tag"].split(",") if row["tag"] else None,
            "duration_bucket": bucket,
            "log_watches": math.log(watched[video] + 1.0),
            "long_watch_ratio": math.log((viewed[video] + 20.0) / (watched[video] + 20.0)),
        }
    return found


def _profiles(raw: pathlib.Path, histories: dict) -> typing.Callable[[str], dict]:
    rows = {row["user_id"]: row for row in csv.DictReader((raw / "user_features_pure.csv").open())}
    flags = ("is_lowactive_period", "is_live_streamer", "is_video_author", "user_active_degree")
    categories = [f"onehot_feat{number}" for number in range(18) if number not in (3, 8)]
    categories += [name for name in next(iter(rows.values())) if name.endswith("_range") or name in flags]
    numbers = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days", "history_len")

    def profile(user: str) -> dict:
        row = rows.get(user)
        if row is None:
            return dict.fromkeys(categories) | {f"log_{name}": None for name in numbers}
        values = row | {"history_len": histories[user]["history_len"] if user in histories else 0}
        logs = {f"log_{name}": math.log(max(float(values[name] or 0), 0.0) + 1) for name in numbers}
        return {name: row[name] or None for name in categories} | logs

    return profile


def _daily_counts(log: dict[tuple, tuple]) -> typing.Callable[[str, str, int], dict]:
    """Exposures, clicks and long views of a user or video on earlier days, as logarithms and smoothed log-odds."""
    trained = [found for (_, _, time_ms), found in log.items() if time_ms // 1000 < APR_25_S + 4 * DAY_S]
    clicked = [long_view for click, long_view, _ in trained if click]
    click_rate, long_rate = len(clicked) / len(trained), sum(clicked) / len(clicked)
    per_day: dict[tuple, dict] = collections.defaultdict(lambda: collections.defaultdict(lambda: [0, 0, 0]))
    for (user, video, time_ms), (click, long_view, _) in log.items():
        for key in (("user", user), ("item", video)):
            sums = per_day[key][(time_ms // 1000 + UTC8_S) // DAY_S]
            for place, value in enumerate((1, click, long_view if click else 0)):
                sums[place] += value

    def odds(positives: int, rows: int, rate: float) -> float:
        return math.log((positives + 20.0 * rate) / (rows - positives + 20.0 * (1 - rate)))

    def counts(kind: str, key: str, day: int) -> dict:
        earlier = [sums for other, sums in per_day[kind, key].items() if other < day]
        shown, clicks, views = (sum(sums[place] for sums in earlier) for place in range(3))
        numbers = math.log(shown + 1.0), odds(clicks, shown, click_rate), odds(views, clicks, long_rate)
        names = ("log_exposures", "click_log_odds", "long_view_log_odds")
        return {f"{kind}_{name}": number for name, number in zip(names, numbers, strict=True)}

    return counts
