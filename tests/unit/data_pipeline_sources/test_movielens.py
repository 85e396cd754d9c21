import pytest

from tests.unit.data_pipeline.conftest import real_data

MOVIES = """1::Am\u00e9lie (2001)::Comedy|Romance
2::Who::What (1999)::Drama
3::Three (2003)::
4::Four (2004)::Comedy
5::Five (2005)::War
"""
RATINGS = [(user, 1 + (user + step) % 4, 5, 100 * user + step // 2) for user in range(1, 7) for step in range(4)]
DAT = "".join("::".join(str(field) for field in row) + "\n" for row in RATINGS)


GENRES = {"1": ["Comedy", "Romance"], "2": ["Drama"], "3": [], "4": ["Comedy"]}


def test_leave_last_out(raw, prepare):
    """User 1 rates 2, 3, 4, 1 at 100, 100, 101, 101: ties keep the order of the lines."""
    raw("ratings.dat", DAT)
    raw("movies.dat", MOVIES)
    data = prepare("movielens")
    items = ["2", "3", "4", "1"]
    for split, step in (("train", 1), ("valid", 2), ("test", 3)):
        row = data.rows(split)["1", 100 + step // 2]
        assert row["history.item"] == items[:step]
        assert [sorted(bag) for bag in row["history.genres"]] == [GENRES[item] or ["UNKNOWN"] for item in items[:step]]
        assert row["candidate.item"][row["label.click"].index(1.0)] == items[step]
    assert data.rows("pretrain")["1",]["history.item"] == ["2", "3"]


def test_protocol_of_hstu(raw, prepare):
    """Movie 5 has no rating, movies 1 to 4 do: all five compete. Training ends right before the test item."""
    raw("ratings.dat", DAT)
    raw("movies.dat", MOVIES)
    data = prepare("movielens", "--no_valid", "--vocabulary", "all_items", "--no_genres")
    assert [feature.name for feature in data.manifest.features] == ["item"]
    assert data.manifest.table("item").num_rows == 2 + 5
    assert data.words["item"][6] == "5"  # by falling count
    items = ["2", "3", "4", "1"]
    assert data.rows("pretrain")["1",]["history.item"] == items[:3]
    assert data.rows("train")["1", 101]["history.item"] == items[:2]
    test = data.rows("test")["1", 101]
    assert test["history.item"] == items[:3] and test["candidate.item"][test["label.click"].index(1.0)] == items[3]
    assert data.manifest.split("valid").num_rows == 0 and data.rows("valid") == {}


def test_all_items_whatever_min_count_says(raw, prepare):
    raw("ratings.dat", DAT)
    raw("movies.dat", MOVIES)
    data = prepare("movielens", "--vocabulary", "all_items", "--min_count", "4")
    assert data.manifest.table("item").num_rows == 2 + 5
    assert data.manifest.table("genres").num_rows < 2 + 3  # genres keep the rule


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_dat_files_in_both_encodings(raw, read_log, encoding):
    raw("ratings.dat", DAT)
    raw("movies.dat", MOVIES.encode(encoding))
    items = {row["item_id"]: row["genres"] for row in read_log("movielens").items.to_pyarrow().to_pylist()}
    assert items == GENRES | {"5": ["War"]}


def test_csv_files(raw, read_log):
    raw("ratings.csv", "userId,movieId,rating,timestamp\n" + DAT.replace("::", ","))
    movies = '1,"Am, ""x"" (2001)",Comedy|Romance\n2,b,Drama\n3,c,(no genres listed)\n4,d,Comedy\n'
    raw("movies.csv", "movieId,title,genres\n" + movies)
    log = read_log("movielens")
    assert {row["item_id"]: row["genres"] for row in log.items.to_pyarrow().to_pylist()} == GENRES
    events = log.events.order_by("order").to_pyarrow().to_pylist()
    assert [(row["user_id"], row["item_id"], row["time_s"]) for row in events] == [
        (str(u), str(i), t) for u, i, _, t in RATINGS
    ]


def test_last_item_by_time(raw, read_log):
    raw("ratings.dat", DAT)
    raw("movies.dat", MOVIES)
    split = read_log("movielens", "--split_rule", "last_item_by_time", "--train_quantile", "0.5").split
    assert split.train_quantile == 0.5


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("ratings.dat", "1::2::five::100\n", "'rating', data row 0: found 'five'"),
        ("ratings.dat", "1::2::5\n", "3 fields, expected 4"),
        ("ratings.dat", DAT + "1::::5::100\n", "'movie', data row 24"),
        ("movies.dat", MOVIES + "6;Six;War\n", "line 6: found '6;Six;War', expected movie::title::genres"),
        ("movies.dat", MOVIES + "1::One::War\n", "line 6: movie '1' is listed twice"),
        ("movies.dat", "\n", "lists no movie"),
    ],
)
def test_bad_lines_are_named(raw, read_log, file, text, words):
    raw("ratings.dat", DAT)
    raw("movies.dat", MOVIES)
    path = raw(file, text)
    with pytest.raises(ValueError, match=words) as error:
        read_log("movielens")
    assert str(path) in str(error.value)


def test_csv_without_a_genre_column(raw, read_log):
    raw("ratings.csv", "userId,movieId,rating,timestamp\n1,1,5,100\n")
    raw("movies.csv", "movieId,title\n1,a\n")
    with pytest.raises(ValueError, match=r"movies\.csv has no column 'genres'"):
        read_log("movielens")


def test_movietweetings_counts(tmp_path, prepare):
    raw_dir = real_data("movietweetings")
    (tmp_path / "raw").symlink_to(raw_dir)
    data = prepare("movielens")
    per_user: dict[str, int] = {}
    for line in (raw_dir / "ratings.dat").read_text().splitlines():
        user = line.split("::")[0]
        per_user[user] = per_user.get(user, 0) + 1
    assert sum(per_user.values()) == 100_000
    num_three, num_four = (sum(count >= least for count in per_user.values()) for least in (3, 4))
    rows = {split.name: split.num_rows for split in data.manifest.splits}
    assert rows["test"] == rows["valid"] == num_three == 6_769
    assert rows["train"] == rows["pretrain"] == num_four == 5_494
    short = sum(count for count in per_user.values() if count < 3)
    assert data.manifest.skipped["events of users with fewer than 3 events"] == short == 12_113
