"""Publishes data sets as versions of a folder, by hand: tests of readers need no build."""

import json
import pathlib
import shutil

from gpsd_dist.data import data_versions


def publish(root: pathlib.Path, *folders: pathlib.Path, current: int = -1) -> list[pathlib.Path]:
    """Copies data sets to `root` as its versions, oldest first; returns their folders. `current`: which one is it."""
    names = [f"{number:04d}-{number:08x}" for number in range(1, len(folders) + 1)]
    for name, folder in zip(names, folders, strict=True):
        shutil.copytree(folder, root / data_versions.VERSIONS / name)
    (root / data_versions.CURRENT_NAME).write_text(json.dumps({"version": names[current], "published": names}))
    return [root / data_versions.VERSIONS / name for name in names]
