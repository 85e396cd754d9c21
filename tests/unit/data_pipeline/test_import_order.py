"""Import order of `data_pipeline`: one list, in which a file (or the folder `sources`) imports only what follows it."""

import pytest

from tests.unit.test_imports import imported_names, modules, rings, room

ORDER = (
    # the command, and the three modes that plan what it writes
    *("inspect", "measures", "build", "append", "holdout", "fresh", "plan", "previous", "counters"),
    # what a plan is made of and how it is written
    *("validate", "validate_rows", "publish", "write", "sequences", "negatives", "unbounded", "splits", "vocab"),
    # raw files to a canonical log
    *(
        "command_line",
        "sources",
        "shares",
        "raw_files",
        "raw_values",
        "text_files",
        "canonical",
        "synthesize",
        "synthetic_log",
    ),
    # the ground
    *("engine", "duckdb_engine", "spark_engine", "spark_json"),
    *("options", "explain", "fingerprint", "hashing", "progress"),
)
FILES = {name: path.read_text() for name, path in modules() if name.startswith("data_pipeline")}


def imports_up(module: str, source: str) -> list[str]:
    """The names that `module` imports although they do not follow it in ORDER."""
    names = {name for name in imported_names(source) if name.startswith("data_pipeline.")}
    here = room(module)
    return [n for n in sorted(names) if here and room(n) != here and ORDER.index(room(n)) < ORDER.index(here)]


def test_every_file_stands_in_the_order_once():
    assert {room(name) for name in FILES} - {""} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_only_what_follows_it(module):
    assert not imports_up(module, FILES[module])


def test_no_ring_of_files():
    assert not rings({name: set(imported_names(source)) for name, source in FILES.items()})


def test_an_import_against_the_order_is_found():
    assert imports_up("data_pipeline.options", "from data_pipeline import sources")
    assert imports_up("data_pipeline.sources.generic", "from data_pipeline.splits import cut")
    assert not imports_up("data_pipeline.sources.generic", "from data_pipeline.sources import json_lines")
