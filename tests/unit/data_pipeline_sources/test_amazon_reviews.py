import gzip
import json

import pytest

REVIEWS = [
    *(("u1", "A", 1), ("u1", "B", 2), ("u1", "C", 2), ("u1", "D", 3)),
    *(("u2", "B", 4), ("u2", "B", 4), ("u2", "A", 5)),  # one repeated review
    *(("u3", "C", 6), ("u3", "A", 9), (None, "A", 1)),
]
META_2014 = "\n".join(
    [
        "{'asin': 'A', 'title': \"it's\", 'categories': [['Food', 'Tea'], ['Food', 'Green Tea']], 'brand': 'Q'}",
        '{"asin": "B", "categories": [["Food", "Tea"]], "brand": ""}',
        "{'asin': 'C', 'categories': [[]]}",
        "{'asin': 'C', 'categories': [['Late']]}",  # repeated: the first line counts
        "{'asin': 'D', 'categories': [['Food']], 'brand': 'R'}",
    ]
)


def _reviews(rows=REVIEWS) -> str:
    names = ("reviewerID", "asin", "unixReviewTime")
    lines = [
        json.dumps({name: value for name, value in zip(names, row) if value is not None} | {"overall": 5.0})
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def test_release_2014_with_loose_metadata(raw, prepare):
    raw("reviews_Food_5.json.gz", gzip.compress(_reviews().encode()))
    raw("meta_Food.json.gz", gzip.compress(META_2014.encode()))
    data = prepare("amazon_reviews", "--train_quantile", "0.6", "--all_categories", "--no_valid")
    train = data.rows("train")
    assert set(train) == {("u1", 3), ("u2", 5)}
    row = train["u1", 3]
    assert row["history.item"] == ["A", "B", "C"]
    assert row["history.category"] == ["Green Tea", "Tea", "UNKNOWN"]  # the last name of the last path
    assert row["history.brand"] == ["Q", "UNKNOWN", "UNKNOWN"]
    assert [sorted(names) for names in row["history.categories"]] == [
        ["Food", "Green Tea", "Tea"],
        ["Food", "Tea"],
        ["UNKNOWN"],
    ]
    assert row["candidate.item"][row["label.click"].index(1.0)] == "D"
    assert train["u2", 5]["history.item"] == ["B"]
    assert data.rows("test")["u3", 9]["history.item"] == ["C"]
    assert data.manifest.skipped["repeated reviews (same reviewer, product and time)"] == 1
    assert data.manifest.skipped["reviews without reviewerID, asin or unixReviewTime"] == 1
    assert data.manifest.skipped["repeated meta lines of a product"] == 1


def test_release_2018(raw, read_log):
    raw("Food_5.json", _reviews())
    raw(
        "meta_Food.json",
        '{"asin": "A", "category": ["Food", "Tea"], "brand": "Q"}\n{"asin": "B", "category": [], "brand": "R"}\n',
    )
    log = read_log("amazon_reviews")
    items = {row["item_id"]: (row["category"], row["brand"]) for row in log.items.to_pyarrow().to_pylist()}
    assert items == {"A": ("Tea", "Q"), "B": (None, "R")}
    assert [spec.name for spec in log.features] == ["item", "category", "brand"]


def test_several_files_and_no_metadata(raw, read_log):
    raw("b.json", _reviews(REVIEWS[2:4]))
    raw("a.json", _reviews(REVIEWS[:2]))
    log = read_log("amazon_reviews", "--no_meta")
    assert [spec.name for spec in log.features] == ["item"]
    assert log.events.order_by(["time_s", "order"]).item_id.execute().tolist() == ["A", "B", "C", "D"]
    assert log.skipped == {}


def test_few_unreadable_lines_are_counted_many_are_an_error(raw, read_log):
    raw("reviews.json", _reviews(REVIEWS * 20) + '{"reviewerID": "u4", "asi')
    raw("meta.json", META_2014)
    assert read_log("amazon_reviews").skipped["review lines that are neither JSON nor a Python literal"] == 1
    raw("reviews.json", _reviews() + "__import__('os').abort()\n")
    with pytest.raises(ValueError, match=r"reviews\.json.*data row 10"):
        read_log("amazon_reviews")


@pytest.mark.parametrize(
    ("reviews", "meta", "words"),
    [
        (None, META_2014, "holds no file of reviews"),
        (_reviews(), None, "build with --no_meta"),
        (_reviews().replace("asin", "sku"), META_2014, "no line has the key 'asin'"),
        (
            _reviews().replace('"unixReviewTime": 3', '"unixReviewTime": "May"'),
            META_2014,
            "'unixReviewTime', data row 3: found 'May'",
        ),
        ("", META_2014, "empty"),
    ],
)
def test_bad_input_is_named(raw, read_log, reviews, meta, words):
    if reviews is not None:
        raw("reviews.json", reviews)
    if meta is not None:
        raw("meta.json", meta)
    with pytest.raises(ValueError, match=words):
        read_log("amazon_reviews")
