"""Writes small raw logs, each with one thing that a build once read wrongly or refused without need."""

import gzip
import json
import pathlib
import random

import pyarrow as pa
import pyarrow.parquet as pq

NUM_USERS, NUM_EVENTS, NUM_ITEMS, START_S = 30, 8, 20, 1_700_000_053
HISTORY = '[history]\nfiles = "log.csv"\nuser = "user_id"\nitem = "item_id"\ntime = "ts"\n'
ITEMS = '[items]\nfiles = "items.csv"\nitem = "item_id"\nfeature = [{ column = "cat" }]\n'


def events() -> list[tuple[int, int, int]]:
    """Draws (user, item, epoch s) of the plain log, by user and time."""
    draw = random.Random(14)
    found, moment = [], START_S
    for user in range(101, 101 + NUM_USERS):
        for _ in range(NUM_EVENTS):
            moment += draw.randint(3, 9)
            found.append((user, 1000 + draw.randrange(NUM_ITEMS), moment))
    return found


def lines(rows, header: str = "user_id,item_id,ts", separator: str = ",", end: str = "\n") -> str:
    """Writes rows as delimited text."""
    return "".join(separator.join(str(value) for value in row) + end for row in [header.split(","), *rows])


def write(folder: pathlib.Path, schema: str, files: dict[str, str | bytes | pa.Table]) -> pathlib.Path:
    """Writes schema.toml and the raw files."""
    for name, content in {"schema.toml": schema, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def table(rows, **columns) -> pa.Table:
    """Makes an Arrow table of the plain columns; `columns` replaces them or adds to them."""
    plain = {name: [row[place] for row in rows] for place, name in enumerate(("user_id", "item_id", "ts"))}
    return pa.table(plain | columns)


def names_that_are_patterns(folder: pathlib.Path) -> pathlib.Path:
    """Two halves of the log: a pattern made of one's name would fit the other."""
    half = len(events()) // 2
    files = {"log[1].csv": lines(events()[:half]), "log1.csv": lines(events()[half:])}
    return write(folder, HISTORY.replace("log.csv", "log*.csv"), files)


def star_in_a_name(folder: pathlib.Path) -> pathlib.Path:
    """A file whose name holds a star, beside one that the star would fit and that belongs to somebody else."""
    files = {"log*.csv": lines(events()), "log_other.csv": lines([(900, 5000, START_S)])}
    return write(folder, HISTORY.replace("log.csv", "log[*].csv"), files)


def folder_named_like_a_column(folder: pathlib.Path, ending: str = "csv") -> pathlib.Path:
    """The folder user_id=alice holds a file with a column user_id."""
    content = table(events()) if ending == "parquet" else lines(events())
    return write(folder, HISTORY.replace("log.csv", f"*/log.{ending}"), {f"user_id=alice/log.{ending}": content})


def partitions(folder: pathlib.Path, feature: str = "country") -> pathlib.Path:
    """The country is the name of a folder."""
    half = len(events()) // 2
    files = {"country=FR/0.parquet": table(events()[:half]), "country=D%2FE/0.parquet": table(events()[half:])}
    schema = HISTORY.replace("log.csv", "**/*.parquet") + f'feature = [{{ column = "{feature}" }}]\n'
    return write(folder, schema, files)


def shown(folder: pathlib.Path, keys: str, **columns) -> pathlib.Path:
    """Exposures of the plain users, two in three clicked; `keys` go into [exposure], `columns` into its file."""
    rows = [(user, 1000 + n % NUM_ITEMS, ts + 3 + n % 5, int(n % 3 > 0)) for n, (user, _, ts) in enumerate(events())]
    names = ("user_id", "item_id", "ts", "click")
    content = pa.table({name: [row[place] for row in rows] for place, name in enumerate(names)} | columns)
    part = HISTORY.replace("history", "exposure").replace("log.csv", "shown.parquet")
    part += 'extends_history = "click"\ntask = [{ column = "click" }]\n'
    part = "".join(line + "\n" for line in part.splitlines() if line.split(" =")[0] not in keys)
    return write(folder, part + keys, {"shown.parquet": content})


def two_labels(folder: pathlib.Path, history: str = "", **columns) -> pathlib.Path:
    """Clicks, some of them bought; both extend the history. `history`: keys of [history], which is left out without."""
    buys = {"buy": [float(n % 3 == 1) for n in range(240)]}
    keys = 'extends_history = ["click", "buy"]\ntask = [{ column = "click" }, { column = "buy", given = "click" }]\n'
    shown(folder, keys, **buys | columns)
    if history:
        rows = [(user, 2000, ts - 100_000, "view") for user, _, ts in events()[::8]]
        rows.append((101, 1000, events()[0][2] + 3, "view"))  # the first exposure, which was not clicked
        rows.append((101, 1001, events()[1][2] + 4, "click"))  # one that was clicked and bought
        part = HISTORY + history + (folder / "schema.toml").read_text()
        write(folder, part, {"log.csv": lines(rows, "user_id,item_id,ts,what")})
    return folder


def json_log(folder: pathlib.Path, user) -> pathlib.Path:
    """JSON lines whose user is `user` of the number, such as an object or a longer number."""
    text = "".join(json.dumps({"user_id": user(u), "item_id": i, "ts": t}) + "\n" for u, i, t in events())
    return write(folder, HISTORY.replace("log.csv", "log.jsonl"), {"log.jsonl": text})


def parquet_log(folder: pathlib.Path, **columns) -> pathlib.Path:
    """The plain log as Parquet, with `columns` in place of its own or beside them."""
    return write(folder, HISTORY.replace("log.csv", "log.parquet"), {"log.parquet": table(events(), **columns)})


def csv_log(folder: pathlib.Path, user=str, header: str = "user_id,item_id,ts", more=(), **options) -> pathlib.Path:
    """The plain log as CSV, whose user is `user` of the number; `more` columns are the same in every row."""
    rows = [(user(u), i, t, *more) for u, i, t in events()]
    return write(folder, HISTORY, {"log.csv": lines(rows, header, **options)})


def weighted(
    folder: pathlib.Path, keys: str = 'weight = "w"\nnegative_sampling_rate = "r"\n', **columns
) -> pathlib.Path:
    """Exposures with sample weights and rates of sampling, by the row."""
    given = {"w": [0.5 * (n % 4) for n in range(240)], "r": [(0.1, 0.25)[n % 2] for n in range(240)]}
    return shown(folder, keys, **given | columns)


def hidden_copies(folder: pathlib.Path) -> pathlib.Path:
    """A notebook keeps a copy of the log, and Spark its own mark."""
    copy = {".ipynb_checkpoints/log-checkpoint.csv": lines(events()), "_SUCCESS": "", "_tmp/log.csv": lines(events())}
    return write(folder, HISTORY.replace("log.csv", "**/*.csv"), copy | {"log.csv": lines(events())})


def integer_and_float_shards(folder: pathlib.Path) -> pathlib.Path:
    """A null made floats of one day's ids; a user has both days."""
    ids = [float(user) for user, _, _ in events()[::2]]
    floats = table(events()[::2], user_id=[None, *ids[1:]], item_id=[float(item) for _, item, _ in events()[::2]])
    return write(
        folder, HISTORY.replace("log.csv", "*.parquet"), {"1.parquet": table(events()[1::2]), "2.parquet": floats}
    )


def rounded_ids(folder: pathlib.Path) -> pathlib.Path:
    """Ids beyond 2^53 in a float: two users may have become one."""
    wide = table(events(), user_id=[float(user + (1 << 60)) for user, _, _ in events()])
    return write(folder, HISTORY.replace("log.csv", "log.parquet"), {"log.parquet": wide})


def items_file(folder: pathlib.Path, spelling: str) -> pathlib.Path:
    """An items file that spells ids in its own way, such as "{}.0" or "0000{}"."""
    rows = [(spelling.format(1000 + n), f"c{n % 3}") for n in range(NUM_ITEMS)]
    return write(folder, HISTORY + ITEMS, {"log.csv": lines(events()), "items.csv": lines(rows, "item_id,cat")})


def seconds_as_ms(folder: pathlib.Path, share: int = 1) -> pathlib.Path:
    """Times in seconds (of every row, or of one in `share`) that the schema says are milliseconds."""
    rows = [(u, i, t if n % share == 0 else t * 1000) for n, (u, i, t) in enumerate(events())]
    return write(folder, HISTORY + 'time_unit = "ms"\n', {"log.csv": lines(rows)})


def text_times(folder: pathlib.Path, suffix: str) -> pathlib.Path:
    """ISO times that name their zone, or not; the schema says Paris."""
    import datetime

    def word(moment: int) -> str:
        return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S") + suffix

    schema = HISTORY + 'time_unit = "iso"\n[split]\ntime_zone = "Europe/Paris"\n'
    return write(folder, schema, {"log.csv": lines([(u, i, word(t)) for u, i, t in events()])})


def parts_of_a_second(folder: pathlib.Path, unit: str) -> pathlib.Path:
    """40 users with 8 events 100 ms apart, which lie in the file from the last to the first."""
    rows = []
    for user in range(40):
        for step in reversed(range(8)):
            ms = 1_700_000_000_000 + user * 100_000 + step * 100
            rows.append((f"u{user}", f"i{(user * 10 + step) % 97}", {"ms": ms, "s": ms / 1000, "us": ms * 1000}[unit]))
    return write(folder, HISTORY + f'time_unit = "{unit}"\n', {"log.csv": lines(rows)})


def quotes_in_tabs(folder: pathlib.Path, style: str = "") -> pathlib.Path:
    """A title begins with a quote, and one many lines later ends with one."""
    titles = ["plain"] * len(events())
    titles[3], titles[40] = '"big screen', '24"'
    rows = [(*row, title) for row, title in zip(events(), titles)]
    schema = HISTORY.replace("log.csv", "log.tsv") + 'feature = [{ column = "title" }]\n[csv]\nseparator = "\\t"\n'
    return write(folder, schema + style, {"log.tsv": lines(rows, "user_id,item_id,ts,title", "\t")})


def backslashes(folder: pathlib.Path, style: str = "") -> pathlib.Path:
    """A quote inside of quotes has a backslash, and a missing value is \\N, as MySQL and Hive write."""
    titles = ["plain"] * len(events())
    titles[3], titles[5], titles[7] = '"24\\" screen, used"', '"C:\\\\"', "\\N"
    rows = [(*row, title) for row, title in zip(events(), titles)]
    schema = HISTORY + 'feature = [{ column = "title" }]\n' + (f"[csv]\n{style}\n" if style else "")
    return write(folder, schema, {"log.csv": lines(rows, "user_id,item_id,ts,title")})


def line_ends_in_values(folder: pathlib.Path) -> pathlib.Path:
    """Real texts of two lines, inside of quotes."""
    rows = [(*row, '"two\nlines, ""quoted"""' if n % 9 == 0 else "one") for n, row in enumerate(events())]
    schema = HISTORY + 'feature = [{ column = "title" }]\n'
    return write(folder, schema, {"log.csv": lines(rows, "user_id,item_id,ts,title")})


def mixed_line_ends(folder: pathlib.Path) -> pathlib.Path:
    """Two files glued together: LF first, CR LF later."""
    half = len(events()) // 2
    text = lines(events()[:half]) + lines(events()[half:], end="\r\n").partition("\n")[2]
    return write(folder, HISTORY, {"log.csv": text})


def word_for_missing_users(folder: pathlib.Path, word: str, style: str = "") -> pathlib.Path:
    """Every fifth row has that word for its user."""
    rows = [(word if n % 5 == 0 else user, item, ts) for n, (user, item, ts) in enumerate(events())]
    return write(folder, HISTORY + style, {"log.csv": lines(rows)})


def every_event_twice(folder: pathlib.Path, keys: str = "") -> pathlib.Path:
    """At-least-once delivery."""
    return write(folder, HISTORY + keys, {"log.csv": lines([row for row in events() for _ in range(2)])})


def attributes_end(folder: pathlib.Path) -> pathlib.Path:
    """Later rows of an item lack its category."""
    seen: dict[int, int] = {}
    rows = []
    for user, item, ts in events():
        seen[item] = seen.get(item, 0) + 1
        rows.append((user, item, ts, f"c{item % 3}" if seen[item] <= 3 else ""))
    schema = HISTORY + '[items]\nfeature = [{ column = "cat" }]\n'
    return write(folder, schema, {"log.csv": lines(rows, "user_id,item_id,ts,cat")})


def empty_shards(folder: pathlib.Path, are_all: bool = False) -> pathlib.Path:
    """Spark writes part files without rows."""
    parts = [] if are_all else [events()[:100], events()[100:]]
    files = {f"part-{place}.parquet": table(part) for place, part in enumerate(parts)}
    none = table([]).cast(table(events()).schema)
    return write(folder, HISTORY.replace("log.csv", "part-*.parquet"), files | {"part-7.parquet": none})


def lists_of(folder: pathlib.Path, kind: pa.DataType) -> pathlib.Path:
    """A bag as a list of that Arrow type; pa.string(): as JSON text in a CSV file."""
    ids, tags = [1000 + n for n in range(NUM_ITEMS)], [[f"t{n % 3}", f"t{n % 5}"] for n in range(NUM_ITEMS)]
    schema = HISTORY + ITEMS.replace('column = "cat"', 'column = "tags", kind = "bag"')
    if kind == pa.string():
        rows = [(item, '"' + json.dumps(bag).replace('"', '""') + '"') for item, bag in zip(ids, tags)]
        return write(folder, schema, {"log.csv": lines(events()), "items.csv": lines(rows, "item_id,tags")})
    items = pa.table({"item_id": ids, "tags": pa.array(tags, kind)})
    schema = schema.replace("items.csv", "items.parquet")
    return write(folder, schema, {"log.csv": lines(events()), "items.parquet": items})


def column_without_a_name(folder: pathlib.Path) -> pathlib.Path:
    """pandas wrote its index."""
    rows = [(place, *row) for place, row in enumerate(events())]
    return write(folder, HISTORY, {"log.csv": lines(rows, ",user_id,item_id,ts")})


def columns_that_differ_in_case(folder: pathlib.Path, names: tuple[str, str]) -> pathlib.Path:
    """Two columns whose names differ in case only."""
    words = {"Cat": [f"a{item % 2}" for _, item, _ in events()], "cat": [f"b{item % 5}" for _, item, _ in events()]}
    first, second = names
    features = f'feature = [{{ column = "Cat", name = "{first}" }}, {{ column = "cat", name = "{second}" }}]\n'
    schema = HISTORY.replace("log.csv", "log.parquet") + features
    return write(folder, schema, {"log.parquet": table(events(), **words)})


def number_column(folder: pathlib.Path, word: str, style: str = "") -> pathlib.Path:
    """A price that is that word in every seventh row."""
    rows = [(*row, word if n % 7 == 0 else "4.5") for n, row in enumerate(events())]
    schema = HISTORY + 'feature = [{ column = "price", kind = "numerical" }]\n' + style
    return write(folder, schema.replace("log.csv", "log.txt"), {"log.txt": lines(rows, "user_id,item_id,ts,price")})


def time_too_large(folder: pathlib.Path, word: str) -> pathlib.Path:
    """One time that is no time."""
    rows = [*events(), (101, 1000, word)]
    return write(folder, HISTORY, {"log.csv": lines(rows)})


def broken_archive(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """A gzip file with a flipped bit in a stored block, cut off, or with one line of 100 MB in 100 kB."""
    schema = HISTORY.replace("log.csv", "log.csv.gz")
    stored = bytearray(gzip.compress(lines(events()).encode(), compresslevel=0))
    stored[len(stored) // 2] ^= 1
    content = {
        "flipped": bytes(stored),
        "cut": gzip.compress(lines(events()).encode())[:-9],
        "long": gzip.compress(b"a" * 100_000_000, compresslevel=9),
    }
    return write(folder, schema, {"log.csv.gz": content[kind]})


def exposures(folder: pathlib.Path, labels: str, keys: str = "", files: dict | None = None) -> pathlib.Path:
    """A log of impressions alone. `labels`: "one class" (no click in valid), "no buys", "click words"."""
    rows, draw = [], random.Random(7)
    for user in range(72):
        for step in range(8):
            is_valid = 5 <= step < 7
            click = int(draw.random() < 0.4 and not (labels == "one class" and is_valid))
            buy = "" if labels == "no buys" else int(click and draw.random() < 0.5)
            word = str(bool(click)).lower() if labels == "click words" else click
            rows.append((f"u{user}", f"i{draw.randrange(40)}", 1_700_000_000 + step * 5000 + user, word, buy))
    schema = '[exposure]\nfiles = "shown.csv"\nuser = "user_id"\nitem = "item_id"\ntime = "ts"\n'
    schema += 'task = [{ column = "click" }, { column = "buy", given = "click" }]\nextends_history = "click"\n'
    schema += keys + "[split]\nvalid_fraction = 0.25\ntest_fraction = 0.125\n"
    content = {"shown.csv": lines(rows, "user_id,item_id,ts,click,buy")}
    return write(folder, schema, content | (files or {}))


def clicks_in_both_logs(folder: pathlib.Path) -> pathlib.Path:
    """Every click is in the history log too, at the same second."""
    exposures(folder, "", "")
    shown = (folder / "shown.csv").read_text().splitlines()[1:]
    clicks = [line.split(",")[:3] for line in shown if line.split(",")[3] == "1"]
    path = folder / "schema.toml"
    path.write_text(HISTORY + path.read_text())
    (folder / "log.csv").write_text(lines([*clicks, *[(f"u{n}", "i1", 1_600_000_000) for n in range(72)]]))
    return folder


def one_far_number(folder: pathlib.Path, keys: str = "") -> pathlib.Path:
    """Prices of 1 ... 9, one of 1e9, and some that are missing."""
    rows = [(*row, 1e9 if n == 100 else "" if n % 11 == 0 else 1 + n % 9) for n, row in enumerate(events())]
    schema = HISTORY + f'feature = [{{ column = "price", kind = "numerical"{keys} }}]\n'
    return write(folder, schema, {"log.csv": lines(rows, "user_id,item_id,ts,price")})


def order_only(folder: pathlib.Path, has_time: bool) -> pathlib.Path:
    """Sequence numbers in place of times, in rows from the last to the first; or no column at all, in order."""
    schema = HISTORY + 'order_only = true\n[split]\nrule = "leave_last_out"\nno_valid = true\n'
    if has_time:
        rows = [(user, item, n % NUM_EVENTS) for n, (user, item, _) in enumerate(events())][::-1]
        return write(folder, schema, {"log.csv": lines(rows)})
    rows = [(user, item) for user, item, _ in events()]
    return write(folder, schema.replace('time = "ts"\n', ""), {"log.csv": lines(rows, "user_id,item_id")})
