"""Tiny raw folders, built through the command line, and the rows read back with raw ids."""

import os
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import build
from gpsd_dist import schema
from gpsd_dist.data import data_versions

APR_25_S = 1650816000  # midnight UTC+8
DAY_S = 86400


def real_data(name: str) -> pathlib.Path:
    """Folder of a real data set; skips the test where it is absent. docs/results.md says where to get them."""
    path = pathlib.Path(os.environ.get("GPSD_RAW", "")) / name
    if "GPSD_RAW" not in os.environ or not path.is_dir():
        pytest.skip(f"needs the data set {name}: set GPSD_RAW to the folder that holds it (docs/results.md)")
    return path


def run(*arguments) -> int:
    """The command line of the build; returns its exit status."""
    return build.main([str(argument) for argument in arguments])


def manifest_of(out_dir: pathlib.Path) -> schema.Manifest:
    """Manifest of the current version."""
    return schema.read_manifest(data_versions.current(out_dir))


def rows_of(out_dir: pathlib.Path, split: str) -> list[dict]:
    """Rows of a split, ordered by user and history length."""
    out_dir = data_versions.current(out_dir)
    manifest = schema.read_manifest(out_dir)
    rows = [row for file in manifest.split(split).files for row in pq.read_table(out_dir / file).to_pylist()]
    return sorted(rows, key=lambda row: (row["user_id"], row["history_length"]))


def words_of(out_dir: pathlib.Path, table: str) -> dict[int, str]:
    """{index: raw id}, with PAD and UNK for the reserved ones."""
    vocab = pq.read_table(data_versions.current(out_dir) / "vocab" / f"{table}.parquet").to_pydict()
    return {0: "PAD", 1: "UNK"} | dict(zip(vocab["index"], vocab["raw_id"]))


def make_grocery(raw: pathlib.Path) -> pathlib.Path:
    """Six users; b and c tie on their last day. Category of item i is 'k' + its parity."""
    raw.mkdir()
    sequences = {
        "a": [("1", 10), ("2", 20), ("3", 30)],
        "b": [("2", 10), ("1", 40), ("4", 40)],
        "c": [("1", 5), ("3", 50), ("5", 50)],
        "d": [("2", 60), ("6", 61)],
        "e": [("1", 70), ("2", 71), ("7", 90)],
        "f": [("3", 80), ("1", 95)],
    }
    lines = [f"{user},{item},k{int(item) % 2},{time}" for user, events in sequences.items() for item, time in events]
    (raw / "interactions.csv").write_text("user,item,cate,timestamp\n" + "\n".join(lines) + "\n")
    negatives = {"a": "5", "b": "3", "c": "2", "d": "1", "e": "3", "f": "2"}
    samples = []
    for user, negative in negatives.items():
        target = sequences[user][-1][0]
        split = "train" if user in "abcd" else "eval"
        samples.append(f"{user},{target},k{int(target) % 2},{negative},k{int(negative) % 2},{split}")
    header = "user,target,target_cate,negative,negative_cate,split\n"
    (raw / "samples.csv").write_text(header + "\n".join(samples) + "\n")
    return raw


@pytest.fixture
def grocery_raw(tmp_path) -> pathlib.Path:
    """A fresh tiny Grocery folder."""
    return make_grocery(tmp_path / "raw")


@pytest.fixture(scope="session")
def grocery(tmp_path_factory) -> pathlib.Path:
    """The prepared data set of `make_grocery`, to be read only; valid is one of the four train users."""
    root = tmp_path_factory.mktemp("grocery")
    out = root / "out"
    assert (
        run(
            "--source",
            "amazon_grocery",
            "--raw_dir",
            make_grocery(root / "raw"),
            "--out_dir",
            out,
            "--valid_fraction",
            0.25,
        )
        == 0
    )
    return data_versions.current(out)


def log_row(user: int, video: int, time_s: float, click: int = 0, long_view: int = 0, tab: int = 1) -> dict:
    """One row of a KuaiRand log; time_s counts from Apr 25 00:00 UTC+8."""
    return {
        "user_id": user,
        "video_id": video,
        "date": 20220425 + max(int(time_s // DAY_S), 0),
        "time_ms": round((APR_25_S + time_s) * 1000),
        "is_click": click,
        "long_view": long_view,
        "tab": tab,
    }


def write_log(path: pathlib.Path, rows: list[dict]) -> None:
    """Parquet or CSV, by the name's end."""
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    lines = [",".join(table.column_names)] + [",".join(str(value) for value in row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n")


LOG_ROWS = [
    log_row(1, 10, 100),
    log_row(1, 11, 200, click=1, long_view=1),
    log_row(1, 12, 200.5, tab=2),  # in the same second as the click: it must not see it
    log_row(1, 13, 300),
    log_row(1, 13, 300),  # repeated
    log_row(1, 10, 4 * DAY_S - 1),  # last second of train: the same history as above
    log_row(1, 11, 4 * DAY_S, click=1),  # first second of valid: another row although the history is the same
    log_row(1, 14, 5 * DAY_S + 5),  # test; video 14 is not in training
    log_row(2, 10, 50, click=1, long_view=0),  # user 2: history bound lies later than this exposure
    log_row(2, 11, 1000),
    log_row(3, 12, 2000),  # user 3: no history
]


def make_kuairand(raw: pathlib.Path) -> pathlib.Path:
    """Users 1, 2 (histories) and 3 (none), videos 10 ... 15."""
    raw.mkdir()
    write_log(raw / "log_standard.parquet", LOG_ROWS)
    histories = [
        {"user_id": 1, "history_len": 3, "last_time_ms": (APR_25_S - 10) * 1000, "watch_seq": [12, 10, 12],
         "long_watch_seq": [10]},
        {"user_id": 2, "history_len": 1, "last_time_ms": (APR_25_S + 60) * 1000, "watch_seq": [11],
         "long_watch_seq": []},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(histories), raw / "user_histories_until_apr24.parquet")
    videos = ["video_id,author_id,video_duration,tag", '10,70,5000,"1,2"', "11,70,12000,2", "12,71,,", "13,72,700000,3"]
    videos += ["14,71,8000,2", "15,79,8000,9"]
    (raw / "video_features_basic_pure.csv").write_text("\n".join(videos) + "\n")
    ranges = ["follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range"]
    flags = ["user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"]
    numbers = ["follow_user_num", "fans_user_num", "friend_user_num", "register_days"]
    onehot = [f"onehot_feat{n}" for n in range(18)]
    names = ["user_id", *flags, *ranges, *numbers, *onehot]
    lines = [",".join(names)]
    for user in (1, 2):  # user 3 has no profile
        lines.append(",".join([str(user), *["x"] * 8, "7", "0", "-124", "99", *["1.0"] * 18]))
    (raw / "user_features_pure.csv").write_text("\n".join(lines) + "\n")
    return raw


@pytest.fixture
def kuairand_raw(tmp_path) -> pathlib.Path:
    """A fresh tiny KuaiRand folder."""
    return make_kuairand(tmp_path / "raw")


@pytest.fixture(scope="session")
def kuairand(tmp_path_factory) -> pathlib.Path:
    """The prepared data set of `make_kuairand`, to be read only."""
    root = tmp_path_factory.mktemp("kuairand")
    out = root / "out"
    assert run("--source", "kuairand_pure", "--raw_dir", make_kuairand(root / "raw"), "--out_dir", out) == 0
    return data_versions.current(out)
