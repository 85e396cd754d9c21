"""Adds to pyproject.toml what it cannot say: the folder configs/ is installed inside of the package."""

import setuptools

setuptools.setup(
    packages=[*setuptools.find_packages(include=["gpsd_dist*", "data_pipeline*"]), "gpsd_dist.configs"],
    package_dir={"gpsd_dist.configs": "configs"},
)
