import gzip

import pytest

from data_pipeline import engine
from data_pipeline.sources import json_lines

LINES = """{"id": "a", "n": 3, "x": 1.5, "tags": [["p", "q"], ["p", "r"]], "t": "say \\"hi\\", | \\\\ \u00e9"}
{"id": "b", "n": "7", "tags": ["q", "r"]}

{"id": "c", "n": 7.0, "tags": "z", "x": null}
"""
KINDS = {"id": "string", "n": "int64", "x": "float64", "tags": "array<string>", "t": "string"}


@pytest.fixture
def running(tmp_path):
    opened = engine.Engine("duckdb", tmp_path)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_values_of_every_kind(running, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(LINES.encode()) if name.endswith(".gz") else LINES.encode())
    table, num_bad = json_lines.read_columns(running, path, KINDS)
    rows = table.order_by("file_order").to_pyarrow().to_pylist()
    assert num_bad == 0
    assert [row["file_order"] for row in rows] == [0, 1, 3]  # the blank line keeps its number
    assert [row["n"] for row in rows] == [3, 7, 7]
    assert [row["x"] for row in rows] == [1.5, None, None]
    assert [row["tags"] for row in rows] == [["p", "q", "p", "r"], ["q", "r"], ["z"]]
    assert rows[0]["t"] == 'say "hi", | \\ \u00e9'


def test_loose_lines_are_literals_only(running, tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_BAD_SHARE", 0.9)
    path = tmp_path / "meta.json"
    bomb = "{'id': " + "[" * 5_000 + "]" * 5_000 + "}"
    lines = [
        "{'id': 'a', 'tags': [['it\\'s']]}",
        "{'id': __import__('os').getcwd()}",
        "[1, 2]",
        "{'id': 1+",
        bomb,
        '{"id": "ok"}',
    ]
    path.write_text("\n".join(lines) + "\n")
    table, num_bad = json_lines.read_columns(running, path, {"id": "string", "tags": "array<string>"}, is_loose=True)
    rows = table.order_by("file_order").to_pyarrow().to_pylist()
    assert [(row["id"], row["tags"]) for row in rows] == [("a", ["it's"]), ("ok", None)]
    assert num_bad == 4


def test_too_long_a_literal_is_not_parsed(running, tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LITERAL_CHARS", 20)
    path = tmp_path / "meta.json"
    path.write_text("{'id': 'a'}\n{'id': 'aaaaaaaaaaaaaaaaaaaaaaa'}\n")
    with pytest.raises(ValueError, match=r"data row 1.*at most 20 characters"):
        json_lines.read_columns(running, path, {"id": "string"}, is_loose=True)


@pytest.mark.parametrize(
    ("text", "kinds", "words"),
    [
        ('{"id": "a"}\n{"id": \n', {"id": "string"}, "data row 1.*one JSON object per line"),
        ('{"id": "a"}\n{"id": "7.5"}\n', {"id": "int64"}, "'id', data row 0: found 'a', expected int64"),
        ('{"id": "a"}\n', {"ID": "string"}, r"no line has the key 'ID'; the keys of the first line are \['id'\]"),
        ("", {"id": "string"}, "empty"),
        ("\n\n", {"id": "string"}, "only blank lines"),
    ],
)
def test_bad_lines_are_named(running, tmp_path, text, kinds, words):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        json_lines.read_columns(running, path, kinds)
    assert str(path) in str(error.value)


def test_a_truncated_archive_is_an_error(running, tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(LINES.encode() * 1000)[:-200])
    with pytest.raises(ValueError, match=r"a\.json\.gz"):
        json_lines.read_columns(running, path, KINDS)
