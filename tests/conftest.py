"""Add --half to pytest: of the tests marked slow, those alone whose turn it is at the checked-out commit."""

import pytest
from by_commit import in_turn


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--half", action="store_true", help="of the slow tests, the half that belongs to the commit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("half"):
        return
    waiting = {item for item in items if item.get_closest_marker("slow") and not in_turn(item.nodeid, 2)}
    config.hook.pytest_deselected(items=list(waiting))
    items[:] = [item for item in items if item not in waiting]
