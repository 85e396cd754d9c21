"""The path that a stranger reads first stays short and explained, and docstrings begin with a sentence."""

import ast
import io
import pathlib
import re
import tokenize

REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]
PATH = (
    "gpsd_dist/train.py",
    "gpsd_dist/trainer.py",
    "gpsd_dist/training_step.py",
    "gpsd_dist/assembly.py",
    "gpsd_dist/stages/registry.py",
    "gpsd_dist/stages/stage.py",
    "gpsd_dist/stages/pretrain.py",
    "gpsd_dist/stages/finetune.py",
    "gpsd_dist/stages/losses.py",
    "gpsd_dist/model/gpsd.py",
    "gpsd_dist/model/transformer.py",
    "gpsd_dist/model/embeddings.py",
    "gpsd_dist/batch/batch.py",
    "gpsd_dist/data/collate.py",
)
MAX_FILES, MAX_LINES = 14, 2000
MIN_COMMENTS_PER_100_LINES = 8
DIRECTIVE = re.compile(r"#\s*(noqa|type:|ruff:|mypy:|pragma|fmt:|codespell:)")
NO_SENTENCE = re.compile(r"(Of|As|The same|What|See)\b")


def docstrings(source: str) -> dict[int, tuple[int, str]]:
    """First line -> (last line, text) of every string that stands as a statement: also those below a field."""
    return {
        node.lineno: (node.end_lineno or node.lineno, node.value.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def lines_without_comments(source: str) -> int:
    return sum(not line.lstrip().startswith("#") for line in source.splitlines())


def lines_of_code(source: str) -> int:
    """Lines that are neither blank, nor comments, nor docstrings."""
    described = {n for first, (last, _) in docstrings(source).items() for n in range(first, last + 1)}
    lines = [line.strip() for number, line in enumerate(source.splitlines(), 1) if number not in described]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def comments(source: str) -> list[str]:
    """Comments that are no directive to a tool."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [t.string for t in tokens if t.type == tokenize.COMMENT and not DIRECTIVE.match(t.string)]


def without_sentence(source: str) -> list[str]:
    """Docstrings that begin with a word from which no sentence can grow."""
    return [text for _, text in docstrings(source).values() if NO_SENTENCE.match(text.strip())]


def room(path: pathlib.Path) -> str:
    return "/".join(path.relative_to(REPO_ROOT).parts[:2])


def untidy_docstrings() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for package in ("gpsd_dist", "data_pipeline"):
        for path in sorted((REPO_ROOT / package).rglob("*.py")):
            for text in without_sentence(path.read_text()):
                found.setdefault(room(path), []).append(f"{path.relative_to(REPO_ROOT)}: {text.strip()[:80]}")
    return found


def test_the_path_is_short():
    sizes = {name: lines_without_comments((REPO_ROOT / name).read_text()) for name in PATH}
    assert len(PATH) <= MAX_FILES
    assert sum(sizes.values()) <= MAX_LINES, sizes


def test_the_path_says_why():
    sources = [(REPO_ROOT / name).read_text() for name in PATH]
    num_comments, num_lines = sum(len(comments(s)) for s in sources), sum(lines_of_code(s) for s in sources)
    assert 100 * num_comments >= MIN_COMMENTS_PER_100_LINES * num_lines, (num_comments, num_lines)


def test_the_reading_list_names_the_path_in_order():
    page = REPO_ROOT / "gpsd_dist" / "README.md"
    listed = re.findall(r"^\d+\. \[[^]]+\]\(([^)]+\.py)\)", page.read_text(), re.MULTILINE)
    assert [str((page.parent / link).relative_to(REPO_ROOT)) for link in listed] == list(PATH)


def test_docstrings_begin_with_a_sentence():
    assert not untidy_docstrings()


SOURCE = '''"""What this is for."""

# Why.
# One more.
x = 1  # because
y = 2  # noqa: E731
"""Of x."""


def f():
    """Sees a thing."""
    return "# no comment"
'''


def test_counting():
    assert lines_without_comments(SOURCE) == 10
    assert lines_of_code(SOURCE) == 4
    assert comments(SOURCE) == ["# Why.", "# One more.", "# because"]
    assert without_sentence(SOURCE) == ["What this is for.", "Of x."]
