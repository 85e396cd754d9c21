"""The files that a stranger reads first stay few, short and explained; and no docstring begins as a riddle."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATH = (
    *("train.py", "trainer.py", "training_step.py", "assembly.py"),
    *("stages/registry.py", "stages/stage.py", "stages/pretrain.py", "stages/finetune.py", "stages/losses.py"),
    *("model/gpsd.py", "model/transformer.py", "model/embeddings.py", "batch/batch.py", "data/collate.py"),
)
MAX_LINES, MAX_FILES = 2000, 14
MAX_RIDDLES = 79  # to be brought down to 0, never up
RIDDLE = re.compile(r"(Of|As|The same|What|See)\b")


def test_the_first_read_path_is_short():
    assert len(PATH) <= MAX_FILES
    lines = [line for name in PATH for line in (ROOT / "gpsd_dist" / name).read_text().splitlines()]
    assert sum(not line.strip().startswith("#") for line in lines) <= MAX_LINES


def test_the_readme_names_the_first_read_path_in_its_order():
    text = (ROOT / "gpsd_dist" / "README.md").read_text()
    section = text[text.index("## Read in this order") :]
    places = [section.index(f"`{name}`") for name in PATH]
    assert places == sorted(places)


def docstrings():
    for package in ("gpsd_dist", "data_pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                    yield path.relative_to(ROOT), ast.get_docstring(node) or ""


def test_first_sentences_stand_alone():
    found = [f"{path}: {text[:60]!r}" for path, text in docstrings() if RIDDLE.match(text)]
    assert len(found) <= MAX_RIDDLES, "\n".join(found)
