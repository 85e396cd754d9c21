"""Lists the sources, one module per raw format, by their names on the command line."""

import importlib
import types

from data_pipeline.options import BuildOptions

SOURCES = {
    "amazon_grocery": "data_pipeline.sources.amazon_grocery",
    "kuairand_pure": "data_pipeline.sources.kuairand_pure",
    "synthetic": "data_pipeline.sources.synthetic",
    "generic": "data_pipeline.sources.generic",
    "taobao": "data_pipeline.sources.taobao",
    "amazon_reviews": "data_pipeline.sources.amazon_reviews",
    "movielens": "data_pipeline.sources.movielens",
}


def load(name: str) -> types.ModuleType:
    """Imports the module of a source (interface: `data_pipeline/canonical.py`); ValueError lists the known names."""
    if name not in SOURCES:
        raise ValueError(f"--source {name!r} is not known; choose one of {sorted(SOURCES)}")
    return importlib.import_module(SOURCES[name])


def complete(source: types.ModuleType, options: BuildOptions) -> BuildOptions:
    """Lets a source with a function `complete` replace defaults by what lies beside the raw files."""
    return source.complete(options) if hasattr(source, "complete") else options
