"""Reads MovieLens and files of its format, such as MovieTweetings: ratings and movies, .dat (parted by "::") or .csv.

Every rating is an event, whatever its stars. Default split: leave the last out, as HSTU and SASRec are evaluated.
"""

import csv
import pathlib
import typing

import ibis.expr.types as ir
import pyarrow as pa
import pydantic.dataclasses

from data_pipeline import canonical, explain, raw_files
from data_pipeline.engine import Engine
from data_pipeline.options import BuildOptions, option

RATINGS = {"user": "string", "movie": "string", "rating": "float64", "time": "int64"}
RATINGS_CSV = {"userId": "string", "movieId": "string", "rating": "float64", "timestamp": "int64"}
MOVIES_CSV = ["movieId", "title", "genres"]
NO_GENRES = "(no genres listed)"


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=explain.STRICT)
class Options:
    """Holds the options of this source."""

    split_rule: typing.Literal["leave_last_out", "last_item_by_time"] = option("leave_last_out")
    train_quantile: float = option(0.7, "of last_item_by_time: part of the users that train")
    no_genres: bool = option(False, "items have no attributes, as published")


def find_files(options: BuildOptions) -> dict[str, pathlib.Path]:
    """Finds the ratings and the movies, both .dat or both .csv."""
    if options.raw_dir is None:
        raise ValueError("--raw_dir is missing; it is the folder that holds ratings.dat or ratings.csv")
    ending = "csv" if (options.raw_dir / "ratings.csv").is_file() else "dat"
    return {
        "ratings": raw_files.require_file(options.raw_dir / f"ratings.{ending}", "user, movie, rating, time"),
        "movies": raw_files.require_file(options.raw_dir / f"movies.{ending}", "movie, title, genres"),
    }


def read(engine: Engine, files: dict[str, pathlib.Path], options: BuildOptions) -> canonical.Log:
    """Takes ratings as events, and genres as a bag."""
    path = files["ratings"]
    if path.suffix == ".csv":
        names, raw = list(RATINGS_CSV), raw_files.read_columns(engine, path, RATINGS_CSV)
    else:
        style = raw_files.TextStyle(separator="::", columns=tuple(RATINGS))
        names, raw = list(RATINGS), raw_files.read_columns(engine, path, RATINGS, style=style)
    raw_files.require_values(path, raw, tuple(names))
    user, movie, _, time = (raw[name] for name in names)
    events = raw.select(user_id=user, item_id=movie, time_s=time, order=raw[raw_files.FILE_ORDER])
    split: canonical.SplitRule = canonical.LeaveLastOut()
    if options.own.split_rule == "last_item_by_time":
        split = canonical.LastItemByTime(
            train_quantile=options.own.train_quantile, valid_fraction=options.valid_fraction
        )
    places = ("history", "candidate")
    genres = () if options.own.no_genres else (canonical.FeatureSpec("genres", places, "items", is_bag=True),)
    return canonical.Log(
        events=engine.materialise("ratings", events),
        items=_movies(engine, files["movies"]),
        features=(canonical.FeatureSpec("item", places, "item_id"), *genres),
        split=split,
        order_words=f"by second, then by the order of the lines in {path.name}",
    )


def _movies(engine: Engine, path: pathlib.Path) -> ir.Table:
    """Reads item_id and genres of every movie.

    Python reads these tens of thousands of lines, because titles hold any character.
    """
    text = _decode(path)
    genres_of: dict[str, list[str]] = {}
    lines = _csv_rows(path, text) if path.suffix == ".csv" else _dat_rows(path, text)
    for number, movie, genres in lines:
        if movie in genres_of:
            raise ValueError(f"{path}, line {number}: movie {movie!r} is listed twice; leave one line for each movie")
        genres_of[movie] = [
            genre.strip() for genre in genres.split("|") if genre.strip() and genre.strip() != NO_GENRES
        ]
    if not genres_of:
        raise ValueError(f"{path} lists no movie; fetch it again")
    columns = [pa.array(genres_of, pa.string()), pa.array(genres_of.values(), pa.list_(pa.string()))]
    return engine.materialise("movies", engine.store(pa.table(columns, names=["item_id", "genres"])))


def _decode(path: pathlib.Path) -> str:
    """Decodes UTF-8 (MovieTweetings, .csv releases) or else Latin-1 (MovieLens 1M), which any bytes fit."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _dat_rows(path: pathlib.Path, text: str):
    """Yields (line number, movie, genres); a title may hold "::"."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("::")
        if len(fields) < 3 or not fields[0].strip():
            raise ValueError(
                f"{path}, line {number}: found {line[:80]!r}, expected movie::title::genres; correct the line"
            )
        yield number, fields[0].strip(), fields[-1]


def _csv_rows(path: pathlib.Path, text: str):
    """Yields (line number, movie, genres)."""
    reader = csv.reader(text.splitlines())
    header = next(reader, [])
    missing = [name for name in MOVIES_CSV if name not in header]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; found {header}: rename the column or use another file")
    movie, genres = header.index("movieId"), header.index("genres")
    for fields in reader:
        if len(fields) != len(header):
            raise ValueError(
                f"{path}, line {reader.line_num}: found {len(fields)} fields, expected {len(header)}; correct it"
            )
        yield reader.line_num, fields[movie].strip(), fields[genres]
