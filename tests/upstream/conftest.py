"""transformers' own tests use names that transformers has deprecated."""

import logging

import pytest


WAIT_FOR_WARNINGS = ("test_bc_cache_name_forward",)


@pytest.fixture(autouse=True)
def deprecated_names():
    """Suspends the guard of all other tests."""
    logger = logging.getLogger("transformers")
    guards = [handler for handler in logger.handlers if type(handler).__name__ == "DeprecationGuard"]
    for guard in guards:
        logger.removeHandler(guard)
    yield
    for guard in guards:
        logger.addHandler(guard)


def pytest_collection_modifyitems(items):
    for item in items:
        if "upstream" in item.path.parts:
            waits = item.name in WAIT_FOR_WARNINGS
            item.add_marker(pytest.mark.filterwarnings("always" if waits else "ignore"))
