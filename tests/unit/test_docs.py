"""What documentation points to exists: files behind links, sections, tests that a page calls its evidence."""

import ast
import pathlib
import re
import subprocess

import pytest

REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]
DECISIONS = sorted((REPO_ROOT / "docs" / "decisions").glob("*.md"))
RAW_DATA_FOLDER = "shared" + "/data"
TEXT = {".py", ".md", ".gin", ".sh", ".json", ".toml", ".yaml"}


def pages() -> list[pathlib.Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.md"], cwd=REPO_ROOT, capture_output=True, text=True, timeout=30
    )
    if listed.returncode == 0 and listed.stdout:
        paths = [REPO_ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # an export without its history
        paths = [path for path in REPO_ROOT.rglob("*.md") if ".venv" not in path.parts]
    return sorted(path for path in paths if path.exists())


def links(page: pathlib.Path) -> list[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def anchors(page: pathlib.Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(REPO_ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} is not there"
        assert not anchor or anchor in anchors(target), f"{link}: no such section"


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[gone](gone.md) and [here](#a-title), `[code](x)`\n")
    assert links(page) == ["gone.md", "#a-title"] and anchors(page) == {"a-title"}


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_is_short_and_has_evidence(page):
    text = page.read_text()
    assert text.startswith(f"# {int(page.stem[:4])}. ") and len(text.splitlines()) < 60
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences", "Evidence"]
    evidence = text.partition("## Evidence")[2]
    named = re.findall(r"`?((?:tests|benchmarks|docs|\.github)/[\w./*-]*\w)", evidence)
    assert named, "no test or figure"
    assert [path for path in named if not (REPO_ROOT / path).exists()] == []


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "gpsd_dist/README.md", "tests/README.md", "docs/README.md"])
def test_files_that_a_guide_names_exist(name):
    """Paths in backticks, from the root; NAME stands for what the reader adds."""
    text = (REPO_ROOT / name).read_text()
    roots = "gpsd_dist|data_pipeline|tests|benchmarks|configs|docs|examples|launch|\\.ci"
    named = set(re.findall(rf"`((?:{roots})/[\w./-]*)`", text))
    assert name != "CONTRIBUTING.md" or len(named) > 30
    assert sorted(path for path in named if "NAME" not in path and not (REPO_ROOT / path).exists()) == []


def test_design_lists_every_decision_in_order():
    numbers = [int(page.stem[:4]) for page in DECISIONS]
    assert numbers == list(range(1, len(DECISIONS) + 1)) and len(DECISIONS) >= 10
    listed = re.findall(r"\(decisions/([\w.-]+)\)", (REPO_ROOT / "docs" / "design.md").read_text())
    assert listed == [page.name for page in DECISIONS]


def test_raw_data_have_no_folder_of_one_machine():
    """Pages and comments say RAW, and docs/results.md where to get the files."""
    folders = ("docs", "configs", "tests", "examples", "benchmarks", "data_pipeline", "gpsd_dist", "launch")
    paths = [path for folder in folders for path in (REPO_ROOT / folder).rglob("*") if path.suffix in TEXT]
    assert len(paths) > 200
    assert [path.relative_to(REPO_ROOT).as_posix() for path in paths if RAW_DATA_FOLDER in path.read_text()] == []


def test_usage_names_the_command_that_was_typed():
    """Without `prog`, the --help of a package would begin with `usage: __main__.py`, which nobody can type."""
    wrong = []
    for path in [*(REPO_ROOT / "gpsd_dist").rglob("*.py"), *(REPO_ROOT / "data_pipeline").rglob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            if ast.unparse(call.func) in ("argparse.ArgumentParser", "Parser"):
                texts = {key.arg: ast.unparse(key.value).strip("'") for key in call.keywords}
                package = ".".join(path.relative_to(REPO_ROOT).with_suffix("").parts).removesuffix(".__main__")
                owners = {"data_pipeline.command_line": "data_pipeline.build"}
                typed, prog = f"python -m {owners.get(package, package)}", texts.get("prog", "")
                if "usage" not in texts and prog != typed and not prog.startswith(f"{typed} "):
                    wrong.append(package)
    assert not wrong


def test_names_in_contributing_stand_in_the_files_beside_them():
    """It sent whoever adds a sampler to `config/run.py`, where there was no NEGATIVES_PER."""
    wrong, num_checked = [], 0
    for item in re.findall(r"^(?:\d+\.|-) (.*(?:\n  +.*)*)", (REPO_ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE):
        named = re.findall(r"`([^`]+)`", item)
        texts = [(REPO_ROOT / name).read_text() for name in named if (REPO_ROOT / name).is_file()]
        for word in [name for name in named if texts and re.fullmatch(r"[A-Za-z_]\w+", name)]:
            num_checked += 1
            if not any(re.search(rf"\b{word}\b", text) for text in texts):
                wrong.append(word)
    assert not wrong and num_checked > 10
