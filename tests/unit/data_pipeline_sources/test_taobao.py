import pytest

T0 = 1_511_539_200  # 2017-11-25 00:00 UTC+8
ROWS = [
    *("1,10,5,pv,0", "1,11,5,cart,10", "1,12,6,buy,10", "1,13,6,pv,20"),  # 11 before 12: same second, order of lines
    *("2,11,5,pv,30", "2,11,5,pv,30", "2,10,5,fav,40"),  # one repeated row
    *("3,12,6,pv,50", "3,10,5,pv,-5", "3,13,6,pv,777600", "3,11,5,pv,777599"),  # two outside the nine days
    "4,13,6,pv,60",  # a single event
]


def _csv(rows=ROWS) -> str:
    lines = []
    for row in rows:
        *fields, time = row.split(",")
        lines.append(",".join([*fields, str(T0 + int(time))]))
    return "\n".join(lines) + "\n"


def test_histories_targets_and_counts(raw, prepare):
    raw("UserBehavior.csv", _csv())
    data = prepare("taobao", "--train_quantile", "0.6", "--no_valid")
    manifest = data.manifest
    assert manifest.max_history_length == 200
    assert manifest.skipped["rows outside 2017-11-25 .. 2017-12-03 (UTC+8)"] == 2
    assert manifest.skipped["repeated rows"] == 1
    train = data.rows("train")  # the last events of users 1, 2 and 3: at 20, 40 and 777599
    assert set(train) == {("1", T0 + 20), ("2", T0 + 40)}
    row = train["1", T0 + 20]
    assert row["history.item"] == ["10", "11", "12"]
    assert row["history.category"] == ["5", "5", "6"]
    assert row["history.behaviour"] == ["pv", "cart", "buy"]
    assert row["history.time_s"] == [T0, T0 + 10, T0 + 10]
    assert sum(row["label.click"]) == 1.0
    assert row["candidate.item"][row["label.click"].index(1.0)] == "13"
    assert "candidate.behaviour" not in row  # what the user will do is not known when the item is scored
    assert train["2", T0 + 40]["history.item"] == ["11"]
    assert data.rows("test")["3", T0 + 777_599]["history.item"] == ["12"]


def test_chosen_behaviours_only(raw, read_log):
    raw("UserBehavior.csv", _csv())
    log = read_log("taobao", "--behaviours", "cart,buy")
    assert sorted(log.events.item_id.execute()) == ["11", "12"]
    assert log.skipped["behaviours that were not chosen"] == 10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_csv() + "5,10,5,look,1511539200\n", "'behaviour', data row 12: found 'look'"),
        (_csv() + "5,10,5,pv,noon\n", "'time', data row 12: found 'noon', expected int64"),
        (_csv() + "5,,5,pv,1511539200\n", "'item', data row 12"),
        ("1,2,3,pv\n", "4 fields, expected 5"),
        ("1,2,3,pv,5\n", "no row lies in 2017-11-25"),
        ("", "empty"),
    ],
)
def test_bad_rows_are_named(raw, read_log, text, words):
    raw("UserBehavior.csv", text)
    with pytest.raises(ValueError, match=words):
        read_log("taobao")


def test_missing_file_and_wrong_option(raw, read_log):
    with pytest.raises(ValueError, match=r"UserBehavior\.csv does not exist"):
        read_log("taobao")
    with pytest.raises(ValueError, match="--behaviours 'pv,sell'"):
        read_log("taobao", "--behaviours", "pv,sell")
