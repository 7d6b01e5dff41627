"""Tests that have passed are not run again: `pytest --passed FILE`, killed at any moment, goes on where it was."""

from pathlib import Path
from typing import Any

import pytest


class Passed:
    """Leaves out the tests that the file names, and adds each that passes as soon as it has."""

    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.getoption("--passed")
        # Workers of xdist are told: the file grows while they start, and all must collect the same.
        told = getattr(config, "workerinput", None)
        self.is_worker = told is not None
        self.before: list[str] = told["passed"] if told is not None else self._read()
        self.called: set[str] = set()  # passed, but for what is torn down

    def _read(self) -> list[str]:
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # pytest was killed amid the line
            self.path.write_text("".join(lines[:-1]))
        return [line[:-1] for line in lines if line.endswith("\n")]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["passed"] = self.before

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        before = set(self.before)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in before])
        items[:] = [item for item in items if item.nodeid not in before]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.is_worker or not report.passed:
            return
        if report.when == "call":
            self.called.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid in self.called:
            with self.path.open("a") as file:
                file.write(report.nodeid + "\n")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Everything passed before: nothing is left to run, and that is no error."""
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.before:
            session.exitstatus = pytest.ExitCode.OK
