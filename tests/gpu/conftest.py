"""What needs a GPU: skipped where there is none, with the reason; what was seen is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from drp.leader.gpus import find_gpus

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here, and skip it where it cannot run."""
    mine = [item for item in items if HERE in item.path.parents]
    try:
        why = "" if not mine or find_gpus() else "there is none"
    except ValueError as error:
        why = str(error)
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.timeout(600 if "compile" in item.name else 150))
        item.add_marker(pytest.mark.filterwarnings("default"))  # torch advises, by warnings, on what GPUs could do
        if why:
            item.add_marker(pytest.mark.skip(reason=f"no GPU: {why}"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failure at once: a session on a GPU may be ended before pytest's summary."""
    if report.failed and HERE.name in report.nodeid:
        print(f"\n{report.nodeid} failed in {report.when}:\n{report.longreprtext}", flush=True)


@pytest.fixture(scope="session")
def uuid() -> str:
    """The first GPU's."""
    return find_gpus()[0].uuid
