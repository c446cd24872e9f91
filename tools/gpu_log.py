"""A pytest plugin that writes down each outcome at once, so that a run that is cut off leaves what it has shown.

It writes one JSON object per line to the file that PIXCONTRAST_TEST_LOG names: the test, its outcome, and the reason.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def _write(report: pytest.CollectReport | pytest.TestReport) -> None:
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    with Path(os.environ["PIXCONTRAST_TEST_LOG"]).open("a") as log:
        log.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "why": why}) + "\n")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if not report.passed:
        _write(report)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        _write(report)
