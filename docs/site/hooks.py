"""Hooks of mkdocs.yml: links into the repository lead to pages of the site, and the options are listed.

A page on GitHub links to `../gpsd_dist/train.py` or `../launch/README.md`. The site has no such file, so every file
that is linked to becomes a page below `repository/`: Markdown as it is, with its own links, anything else as a listing.
So a link is written once, as GitHub wants it, needs no address of a repository, and shows the version that the site was
built from.
"""

import os
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

from gpsd_dist.config.gin_cli import all_options
from gpsd_dist.config.option_list import defaults_text

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".json": "json", ".toml": "toml"}
# Code is passed over: brackets in it are no links.
LINK = re.compile(r"(?P<code>^ *```.*?^ *```|`[^`\n]*`)|\]\((?P<target>[^)\s]+)\)", re.DOTALL | re.MULTILINE)


def on_files(files, config):
    """Adds the pages of what is linked to, and of what those pages link to."""
    todo, seen = [pathlib.Path(file.abs_src_path) for file in files.documentation_pages()], set()
    while todo:
        origin = todo.pop()
        for target, _ in _targets(origin):
            if target in seen or files.get_file_from_path(_uri(target)):
                continue
            seen.add(target)
            files.append(File.generated(config, _uri(target), content=_content(target)))
            todo.append(target)
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links at the pages that `on_files` made, and lists the options."""
    origin = _origin(page.file.src_uri)

    def moved(match):
        if match["code"] or "://" in match["target"] or match["target"].startswith(("#", "mailto:")):
            return match[0]
        name, sharp, anchor = match["target"].partition("#")
        target = pathlib.Path(os.path.normpath(origin.parent / name))
        here = posixpath.dirname(page.file.src_uri)
        return f"]({posixpath.relpath(_uri(target), here or '.')}{sharp}{anchor})"

    return LINK.sub(moved, markdown).replace("<!-- options -->", _options_page())


def _targets(origin):
    """Finds (path, anchor) of every link to a file or folder of the repository that is there."""
    if origin.suffix != ".md":
        return
    for match in LINK.finditer(origin.read_text()):
        name, _, anchor = (match["target"] or "").partition("#")
        target = pathlib.Path(os.path.normpath(origin.parent / name))
        if name and "://" not in name and target.exists() and target != origin:
            yield target, anchor


def _uri(path):
    """Names the page of a file: its own place in docs/, else below repository/."""
    inside = path.is_relative_to(DOCS)
    base = path.relative_to(DOCS if inside else ROOT).as_posix()
    name = f"{base}/README.md" if path.is_dir() else base
    if not inside:
        name = posixpath.normpath(f"repository/{name if name.endswith('.md') else name + '.md'}")
    return posixpath.normpath(name)


def _origin(uri):
    """Finds the file of the repository that a page was made of."""
    if not uri.startswith("repository/"):
        return DOCS / uri
    path = ROOT / uri.removeprefix("repository/")
    return path if path.exists() else path.with_suffix("")


def _content(path):
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        readme = path / "README.md"
        if readme.exists():
            return readme.read_text()
        rows = (f"- `{child.name}`" for child in sorted(path.iterdir()) if child.name[0] not in "._")
        return f"# {name}/\n\n" + "\n".join(rows) + "\n"
    if path.suffix == ".md":
        return path.read_text()
    fence = "`" * 6
    listing = f"{fence}{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n{fence}"
    return f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n{listing}\n"


def _options_page():
    """Writes every option with its default in a definition list, a section per dataclass."""
    lines = []
    for group in all_options():
        lines += [f"## {group.title}", "", group.doc, ""]
        for option in group.options:
            also = "" if option.name == option.field else f" (`{option.field}`)"
            default = defaults_text(option)
            if default.startswith("pretrain: "):  # it is no value that one could type
                also, default = f"{also}; {default}", "..."
            doc = " ".join(option.doc.split()) or "(no documentation)"
            lines += [f"`--gin.{option.name}={default}`{also}", "", f":   {doc}", ""]
    return "\n".join(lines)
