"""Lets every test be collected where packages of data preparation are missing, as on a machine that only trains."""

import importlib.util
import pathlib
import sys

import pytest

OPTIONAL = ("ibis", "duckdb", "lightgbm", "pyspark", "triton")
_UNIT = pathlib.Path(__file__).parent / "unit"
_OF_THE_PIPELINE = (_UNIT / "data_pipeline", _UNIT / "data_pipeline_sources")  # their conftest needs ibis itself


def _is_missing(package: str) -> bool:
    blocked = package in sys.modules and sys.modules[package] is None
    return blocked or (package not in sys.modules and importlib.util.find_spec(package) is None)


MISSING = tuple(package for package in OPTIONAL if _is_missing(package))


def pytest_report_header():
    """Says it once, so that nothing is left out in silence."""
    return f"not installed: {', '.join(MISSING)}; files that import them are skipped" if MISSING else None


def pytest_ignore_collect(collection_path, config):
    """Leaves out the two folders whose conftest cannot be imported."""
    return True if "ibis" in MISSING and collection_path in _OF_THE_PIPELINE else None


class _Module(pytest.Module):
    """Skips a file that cannot be imported for want of an optional package; any other error stays one."""

    def _getobj(self):
        try:
            return super()._getobj()
        except self.CollectError as error:
            words = str(error)
            for package in MISSING:
                if f"No module named '{package}" in words or f"import of {package} halted" in words:
                    pytest.skip(f"{package} is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path, parent):
    """Makes every test file such a module."""
    return _Module.from_parent(parent, path=module_path)
