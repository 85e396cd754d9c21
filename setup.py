"""Adds to pyproject.toml what it cannot say: the folder configs/ is installed inside of the package."""

import setuptools

CONFIGS = "gpsd_dist.configs"
setuptools.setup(
    packages=[
        *setuptools.find_packages(include=["gpsd_dist*", "data_pipeline*"]),
        *(CONFIGS, *(f"{CONFIGS}.{folder}" for folder in setuptools.find_namespace_packages("configs"))),
    ],
    package_dir={CONFIGS: "configs"},
)
