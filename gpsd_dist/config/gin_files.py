"""Finds gin files: by path, in the folder `configs` of the working directory, in the package."""

import pathlib

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = (_PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent) / "configs"
"""Files that come with the program: inside of an installed package, beside it in a checkout."""


def find(name: str, included_by: pathlib.Path | None = None) -> pathlib.Path | None:
    """Returns the first file that `name` can mean, `configs/` in front of it or not; None if there is none.

    An include in a file of the package (`included_by`) means a file of the package, whatever the user calls his own.
    """
    short = name.removeprefix("configs/")
    places = [CONFIGS / short, CONFIGS.parent / name]
    if included_by is None or not included_by.is_relative_to(CONFIGS):
        places = [pathlib.Path(name), pathlib.Path("configs", short), *places]
    return next((place.resolve() for place in places if place.is_file()), None)


def known() -> list[str]:
    """Lists the files of the package as one writes them: `configs/stage/pretrain.gin`."""
    return sorted(str(path.relative_to(CONFIGS.parent)) for path in CONFIGS.rglob("*.gin"))
