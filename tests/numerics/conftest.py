import pytest


def pytest_collection_modifyitems(items) -> None:
    """Marks every test of this folder as an equivalence: each compares the product with a reference."""
    for item in items:
        if "numerics" in item.path.parts:
            item.add_marker(pytest.mark.equivalence)
