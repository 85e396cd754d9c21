"""Reads KuaiRand-Pure: short-video exposures with clicks and long views (Gao et al., CIKM 2022).

log_*.parquet / log_*.csv           labelled exposures, the columns of the official log; log_random_* is left alone
user_histories_until_apr24.parquet  per user the last <= 50 exposures before Apr 25, without a time per event
video_features_basic_pure.csv, user_features_pure.csv

What a request may know: the video, the tab it is shown in, the hour, the user's profile, the history until then, and
how often the user and the video were shown, clicked and viewed long on earlier days. Play time, stay times and every
other is_* column are outcomes, so they are not even read.

The counts stop at midnight on purpose. A user's rate up to the second of the request falls after each skip and rises
after each click of that user's own few rows of the day, so it orders them against their labels (docs/results.md).
"""

import itertools
import pathlib

import ibis
import ibis.expr.types as ir

from data_pipeline import canonical, raw_files
from data_pipeline.engine import Engine
from data_pipeline.options import BuildOptions
from gpsd_dist import schema

UTC8_S = 8 * 3600
DAY_S = 86400
APR_25_S = 1650816000  # 2022-04-25 00:00 UTC+8
FIRST_LOG_DATE = 20220425  # `date` and time_ms disagree near midnight: by time_ms, rows of this date may lie on Apr 24
SPLIT = canonical.TimeBoundaries(
    valid_from_s=APR_25_S + 4 * DAY_S,
    test_from_s=APR_25_S + 5 * DAY_S,
    test_until_s=APR_25_S + 6 * DAY_S,
    pretrain_until_s=APR_25_S,
    words="by time_ms, midnight UTC+8 of 2022: pretrain until Apr 24, train Apr 25-28, valid Apr 29, test Apr 30, "
    "holdout May 1 on",
)
LOG = dict.fromkeys(("user_id", "video_id"), "string") | dict.fromkeys(
    ("date", "time_ms", "is_click", "long_view", "tab"), "int64"
)
HISTORIES = {
    "user_id": "string",
    "history_len": "int64",
    "last_time_ms": "int64",
    "watch_seq": "array<string>",
    "long_watch_seq": "array<string>",
}
VIDEOS = {"video_id": "string", "author_id": "string", "video_duration": "float64", "tag": "string"}
DURATION_EDGES_S = (7, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300, 600)  # untuned
USER_CATEGORIES = (
    "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author",
    "follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range",
    *(f"onehot_feat{n}" for n in range(18) if n not in (3, 8)),  # 3 and 8 have about 1,500 and 450 values
)  # fmt: skip
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
DAILY_COUNTS = ("log_exposures", "click_log_odds", "long_view_log_odds")
RATE_PSEUDO_COUNTS = 20.0  # weight of the overall rate in a smoothed one: the baseline's value, untuned
FEATURE_FILES = {
    "histories": ("user_histories_until_apr24.parquet", "each user's exposures before Apr 25"),
    "videos": ("video_features_basic_pure.csv", "the video attributes"),
    "users": ("user_features_pure.csv", "the user attributes"),
}


def find_files(options: BuildOptions) -> dict[str, pathlib.Path]:
    """Finds every log file and the three others.

    Where rows are added to a data set, files that --raw_dir lacks are taken from the folder that it was built from.
    """
    raw_dir = raw_files.require_folder(options.raw_dir)
    folders = [raw_dir] if options.built_from_dir is None else [raw_dir, options.built_from_dir]
    logs: dict[str, pathlib.Path] = {}
    for folder in folders:
        found = [path for path in sorted(folder.glob("log_*")) if path.suffix in (".parquet", ".csv")]
        found = [path for path in found if not path.name.startswith("log_random")]
        if not found:
            raise ValueError(f"{folder} holds no log_*.parquet or log_*.csv (found {_names(folder)}); check --raw_dir")
        for path in found:
            logs.setdefault(path.name, raw_files.require_file(path, "labelled exposures"))
    files = {f"log:{name}": path for name, path in logs.items()}
    for key, (name, what) in FEATURE_FILES.items():
        candidates = [folder / name for folder in folders]
        files[key] = raw_files.require_file(next((path for path in candidates if path.is_file()), candidates[-1]), what)
    return files


def _names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))[:20]


def read(engine: Engine, files: dict[str, pathlib.Path], options: BuildOptions) -> canonical.Log:
    """Takes the histories and then every click of the log as events, and every row of the log, once, as an exposure."""
    exposures, skipped = _read_log(engine, [path for key, path in files.items() if key.startswith("log:")])
    histories = engine.materialise("histories", raw_files.read_columns(engine, files["histories"], HISTORIES))
    raw_files.require_values(files["histories"], histories, ("user_id", "last_time_ms", "watch_seq"))
    raw_files.require_unique(files["histories"], histories, "user_id")
    places = ("history", "candidate")
    spec = canonical.FeatureSpec
    features = [
        spec("item", places, "item_id"),
        spec("author", places, "items"),
        spec("tag", places, "items", is_bag=True),
        spec("duration_bucket", places, "items"),
        spec("behaviour", ("history",), "log"),
        spec("tab", ("candidate",), "log"),
        spec("hour", ("candidate",), "log"),
        *[spec(name, ("context",), "users") for name in USER_CATEGORIES],
        *[spec(f"log_{name}", ("context",), "users", kind="numerical") for name in (*USER_NUMBERS, "history_len")],
        *[spec(f"user_{name}", ("context",), "log", kind="numerical") for name in DAILY_COUNTS],
        *[spec(f"item_{name}", ("candidate",), "log", kind="numerical") for name in DAILY_COUNTS],
        *[spec(name, ("candidate",), "items", kind="numerical") for name in ("log_watches", "long_watch_ratio")],
    ]
    return canonical.Log(
        events=_events(histories, exposures),
        exposures=exposures,
        items=_read_videos(engine, files["videos"], histories),
        users=_read_users(engine, files["users"], histories),
        features=tuple(features),
        tasks=(schema.Task("click"), schema.Task("long_view", given="click")),
        split=SPLIT,
        order_words="the histories in their given order, then by second, millisecond and video id; duplicate log rows "
        "(same user, video, time_ms) keep the one with the higher labels",
        skipped=skipped,
    )


def _read_log(engine: Engine, paths: list[pathlib.Path]) -> tuple[ir.Table, dict[str, int]]:
    """Reads exposures without repeats, with their labels, hour, tab and the user's strictly earlier counts."""
    parts, num_read = [], 0
    for place, path in enumerate(paths):
        part = engine.materialise(f"log_{place}", raw_files.read_columns(engine, path, LOG))
        raw_files.require_values(path, part, tuple(LOG))
        for label in ("is_click", "long_view"):
            raw_files.require_one_of(path, part, label, (0, 1))
        num_read += int(part.count().execute())
        parts.append(part.drop(raw_files.FILE_ORDER))
    rows = parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]
    dated = rows.filter(rows.date >= FIRST_LOG_DATE)
    num_dated = int(dated.count().execute())
    best_first = [dated.is_click.desc(), dated.long_view.desc(), dated.tab]
    copies = ibis.window(group_by=["user_id", "video_id", "time_ms"], order_by=best_first)
    once = dated.mutate(copy=ibis.row_number().over(copies)).filter(ibis._.copy == 0)
    time_s = (once.time_ms // 1000).cast("int64")
    once = engine.materialise(
        "log",
        once.select(
            "user_id",
            item_id=once.video_id,
            time_s=time_s,
            order=once.time_ms,
            click=once.is_click.cast("float64"),
            long_view=once.long_view.cast("float64"),
            tab=once.tab.cast("string"),
            hour=(((time_s + UTC8_S) // 3600) % 24).cast("int64").cast("string"),
        ),
    )
    skipped = {
        f"log rows dated before {FIRST_LOG_DATE} (the histories stand for them)": num_read - num_dated,
        "repeated log rows (same user, video and time_ms)": num_dated - int(once.count().execute()),
    }
    counted = _with_earlier_days(_with_earlier_days(once, "user_id", "user"), "item_id", "item")
    return engine.materialise("counted_log", counted), {reason: count for reason, count in skipped.items() if count}


def _with_earlier_days(log: ir.Table, key: str, prefix: str) -> ir.Table:
    """Adds `<prefix>_<DAILY_COUNTS>`: counts of the same `key` in the log on earlier days (midnight UTC+8)."""
    dated = log.mutate(day=(log.time_s + UTC8_S) // DAY_S)
    trained = dated.filter(dated.time_s < SPLIT.valid_from_s)
    click_rate = trained.click.mean().as_scalar()
    long_rate = trained.filter(trained.click == 1).long_view.mean().as_scalar()
    clicked_long = ibis.ifelse(dated.click == 1, dated.long_view, 0.0)
    per_day = dated.group_by([key, "day"]).agg(
        shown=dated.count().cast("float64"), clicked=dated.click.sum(), viewed=clicked_long.sum()
    )
    so_far = ibis.window(group_by=key, order_by=per_day.day, preceding=None, following=0)
    earlier = per_day.mutate(
        **{name: per_day[name].sum().over(so_far) - per_day[name] for name in ("shown", "clicked", "viewed")}
    )
    joined = dated.inner_join(earlier, [key, "day"])
    numbers = (
        (earlier.shown + 1).ln(),
        _log_odds(earlier.clicked, earlier.shown, click_rate),
        _log_odds(earlier.viewed, earlier.clicked, long_rate),
    )
    return joined.select(log, **{f"{prefix}_{name}": number for name, number in zip(DAILY_COUNTS, numbers)})


def _log_odds(positives: ir.NumericValue, rows: ir.NumericValue, overall_rate: ir.NumericValue) -> ir.NumericValue:
    """Computes the log-odds of the rate positives / rows, smoothed towards `overall_rate`."""
    yes = positives + RATE_PSEUDO_COUNTS * overall_rate
    no = rows - positives + RATE_PSEUDO_COUNTS * (1 - overall_rate)
    return (yes / no).ln()


def _events(histories: ir.Table, exposures: ir.Table) -> ir.Table:
    """Joins the histories and the clicks of the log.

    History events have no time, only the user's last one as an upper bound.
    """
    placed = histories.mutate(place=ibis.range(0, histories.watch_seq.length()).unnest().cast("int64"))
    video = placed.watch_seq[placed.place]
    is_long = ibis.coalesce(placed.long_watch_seq.contains(video), False)
    before = placed.select(
        "user_id",
        item_id=video,
        time_s=ibis.null("int64"),
        latest_s=(placed.last_time_ms // 1000).cast("int64"),
        order=placed.place,
        behaviour=ibis.cases((is_long, "long_view"), else_="watch"),
    )
    clicks = exposures.filter(exposures.click == 1)
    after = clicks.select(
        "user_id",
        "item_id",
        "time_s",
        latest_s=clicks.time_s,
        order=clicks.order,
        behaviour=ibis.cases((clicks.long_view == 1, "long_view"), else_="watch"),
    )
    return before.union(after)


def _read_videos(engine: Engine, path: pathlib.Path, histories: ir.Table) -> ir.Table:
    """Reads attributes, and counts how often the video stands in the histories, watched and watched long."""
    raw = engine.materialise("videos", raw_files.read_columns(engine, path, VIDEOS))
    raw_files.require_values(path, raw, ("video_id",))
    raw_files.require_unique(path, raw, "video_id")
    seconds = raw.video_duration / 1000
    edges = (0, *DURATION_EDGES_S)
    branches = [(seconds < high, f"{low}-{high}s") for low, high in itertools.pairwise(edges)]
    bucket = ibis.cases((seconds.isnull(), ibis.null("string")), *branches, else_=f"{edges[-1]}s-")
    watched, viewed_long = _per_video(histories, "watch_seq"), _per_video(histories, "long_watch_seq")
    joined = raw.left_join(watched, raw.video_id == watched.watch_seq)
    joined = joined.left_join(viewed_long, joined.video_id == viewed_long.long_watch_seq)
    zero = ibis.literal(0.0)
    watches, long_views = ibis.coalesce(watched.times, zero), ibis.coalesce(viewed_long.times, zero)
    # This is no rate: both sequences are cut at 50, so a video can occur in more long views than watches.
    ratio = (long_views + RATE_PSEUDO_COUNTS) / (watches + RATE_PSEUDO_COUNTS)
    return joined.select(
        item_id=raw.video_id,
        author=raw.author_id,
        tag=raw.tag.split(","),
        duration_bucket=bucket,
        log_watches=(watches + 1).ln(),
        long_watch_ratio=ratio.ln(),
    )


def _per_video(histories: ir.Table, sequence: str) -> ir.Table:
    """Counts in how many places of all users' sequences a video stands: `sequence` (video id) and `times`."""
    videos = histories.select(histories[sequence].unnest().name(sequence))
    return videos.group_by(sequence).agg(times=videos.count().cast("float64"))


def _read_users(engine: Engine, path: pathlib.Path, histories: ir.Table) -> ir.Table:
    columns = {"user_id": "string"} | dict.fromkeys(USER_CATEGORIES, "string") | dict.fromkeys(USER_NUMBERS, "float64")
    raw = engine.materialise("users", raw_files.read_columns(engine, path, columns))
    raw_files.require_values(path, raw, ("user_id",))
    raw_files.require_unique(path, raw, "user_id")
    lengths = histories.select(history_user=histories.user_id, history_len=histories.history_len)
    joined = raw.left_join(lengths, raw.user_id == lengths.history_user)
    zero = ibis.literal(0.0)
    logs = {
        f"log_{name}": (ibis.greatest(ibis.coalesce(joined[name].cast("float64"), zero), zero) + 1).ln()
        for name in (*USER_NUMBERS, "history_len")
    }
    return joined.select("user_id", *USER_CATEGORIES, **logs)
