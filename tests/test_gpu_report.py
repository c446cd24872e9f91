"""The run on a GPU, rehearsed without one and with only the packages that such a machine has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from importlib.metadata import distribution
from pathlib import Path

import ninja
import pytest
from packaging.requirements import Requirement

from benchmarks.__main__ import plan
from tools import gpu_report, processes
from tools.gpu_report import PARTS, TIMINGS, Run, Step, python

ROOT = Path(__file__).resolve().parents[1]
INSTALLED_THERE = ("torch", "triton", "numpy", "pytest", "pybind11", "setuptools", "ninja")


def closure(names: tuple[str, ...]) -> set[str]:
    """The named distributions and all that they require."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            wanted = [Requirement(text) for text in distribution(name).requires or []]
            pending += [
                each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})
            ]
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A Python with only these distributions and what they require, as links to those installed here."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in closure(INSTALLED_THERE):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():  # many share the folder nvidia/
                link.symlink_to(distribution(name).locate_file(top))
    # The very same ninja: another version does not believe the first one's log, and compiles everything again.
    (folder / "bin" / "ninja").symlink_to(Path(ninja.BIN_DIR) / "ninja")
    return folder / "bin" / "python"


def rehearse(interpreter: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [interpreter, "-s", "-m", "tools.gpu_report", "--rehearse", "--out", out, *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIXCONTRAST_")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1", "OUT": "/nowhere"}
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def report_of(out: Path) -> str:
    (path,) = out.glob("*-rehearsal-*/report.md")
    return path.read_text()


def rows_of(report: str) -> dict[str, list[str]]:
    """State and numbers of passed, failed and skipped tests, by step."""
    lines = [
        line.split(" | ") for line in report.splitlines() if line.startswith("| ") and "step |" not in line
    ]
    return {name.removeprefix("| "): rest for name, *rest in lines}


def test_every_part_runs_to_its_end_where_little_is_installed(bare_python, tmp_path):
    missing = ("kornia", "tyro", "timm", "torchvision", "pytorch_metric_learning", "rich", "hypothesis")
    code = f"import importlib.util; print([n for n in {missing} if importlib.util.find_spec(n)])"
    assert subprocess.check_output([bare_python, "-c", code], text=True).strip() == "[]"

    run = rehearse(
        bare_python, tmp_path, "--suite", "gather", "properties", "--tests", "no_rows or zero_norm or rules"
    )
    output, _ = run.communicate()
    assert run.returncode == 0, output
    report = report_of(tmp_path)
    rows = rows_of(report)
    assert {name.partition(":")[0] for name in rows} == {"build", *PARTS}
    assert {state for state, *_ in rows.values()} == {"done"}
    for name, (_, passed, failed, skipped, _) in rows.items():
        assert failed == "0"
        assert name in output
        if "what needs one" in name:
            assert skipped == "1: torch finds no CUDA device"
        elif "properties" in name:
            assert "could not import 'hypothesis'" in skipped
        else:
            assert int(passed) > 0
    assert "ours (cuda)" in report  # the timings, as they were printed
    assert "ours (triton)" in report
    assert "TFLOP/s" in (tmp_path / "rehearsal.csv").read_text()
    (folder,) = tmp_path.glob("*-rehearsal-*")
    assert {path.name for path in folder.iterdir()} == {"report.md", "logs.tar.gz"}
    with tarfile.open(folder / "logs.tar.gz") as archive:
        assert len(archive.getnames()) >= len(rows)


def test_a_run_that_is_killed_leaves_what_it_has_shown(tmp_path):
    run = rehearse(Path(sys.executable), tmp_path, "suite", "--suite", "gather", "sampling")

    def outcomes() -> list[str]:
        return [line for path in tmp_path.glob("*/*.jsonl") for line in path.read_text().splitlines()]

    while not outcomes() and run.poll() is None:
        time.sleep(0.2)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    rows = rows_of(report_of(tmp_path))
    assert rows["build: the emulator"][:3] == ["done", "1", "0"]
    assert rows["suite: test_gather, triton"][0] == "running"
    assert rows["suite: test_sampling, cuda"][0] == "not begun"
    assert any('"outcome": "passed"' in line for line in outcomes())


def test_what_is_to_be_timed_exists():
    for op, shape, dtypes, _ in TIMINGS:
        planned = plan([op], "cuda", [shape], list(dtypes))
        assert {each.dtype for each in planned} >= set(dtypes)
        assert planned


def step(name: str, code: str, needs: float = 0.0) -> Step:
    return Step("device", name, python("-c", code), needs)


def test_a_budget_leaves_out_what_no_longer_fits(tmp_path, capsys):
    log = tmp_path / "00-long.log"

    class Slow(Run):
        """A run whose budget is almost spent as soon as the first step is running."""

        def left(self) -> float:
            if not log.exists():
                return 600
            while log.read_text() != "begun\n":
                time.sleep(0.1)
            return 3

    steps = [
        step("long", "print('begun', flush=True); import time; time.sleep(100_000)", needs=1),
        step("longer", "", needs=500),
        step("nothing to it", ""),
    ]
    Slow(steps, tmp_path, {"device": "none"}, budget=600).go()
    assert steps[0].state == "cut off at the end of the budget"
    assert steps[1].state.startswith("not begun: it needs about 500 s, ")
    assert steps[0].detail == "begun\n"
    assert "| device: longer | not begun: it needs about 500 s" in capsys.readouterr().out


def test_a_step_that_hangs_is_a_failure_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "LONGEST", 3.0)
    steps = [
        step("hangs", "print('got here', flush=True); import time; time.sleep(100_000)"),
        step("next", "print('fine')"),
    ]
    Run(steps, tmp_path, {"device": "none"}, budget=None).go()
    assert (steps[0].state, steps[0].failed, steps[0].detail) == ("cut off after 3 s", 1, "got here\n")
    assert steps[1].state == "done"


def test_steps_run_beside_each_other_where_no_time_is_taken(tmp_path):
    def meets(name: str, other: str) -> str:
        return f"""
import pathlib, time
pathlib.Path({name!r}).touch()
while not pathlib.Path({other!r}).exists(): time.sleep(0.1)
time.sleep(1)
pathlib.Path({name!r}).rename({name + " done"!r})
"""

    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    alone = f"import pathlib; assert all(pathlib.Path(x + ' done').exists() for x in ({one!r}, {two!r}))"
    steps = [step("one", meets(one, two)), step("two", meets(two, one))]
    steps.append(Step("timings", "alone", python("-c", alone), 0))
    Run(steps, tmp_path, {"device": "none"}, budget=processes.LIMIT, jobs=2).go()
    assert [each.passed for each in steps] == [1, 1, 1]


def test_what_fails_is_counted_and_shown(tmp_path):
    source = tmp_path / "test_some.py"
    source.write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_left_out(): pytest.skip('for a reason')\n"
    )
    tests = Step("suite", "some", python("-m", "pytest", "-q", "-p", "tools.gpu_log", str(source)), 0)
    broken = step("broken", "raise SystemExit('out of memory')")
    silent = Step("sanitize", "silent", python("-c", "print('ERRORS: 2')"), 0, shows="ERRORS: 0")
    absent = Step("sanitize", "absent", ["no-such-program"], 0, missing="no-such-program is not on PATH")
    unnamed = Step("suite", "unnamed", [*tests.command, "-k", "no_such_test"], 0)
    unbuilt = [Step("build", "module", python("-c", "raise SystemExit(3)"), 0), step("later", "")]
    Run([tests, broken, silent, absent, unnamed, *unbuilt], tmp_path, {"device": "none"}, budget=None).go()
    assert (tests.passed, tests.failed, dict(tests.skipped)) == (1, 1, {"for a reason": 1})
    assert "assert 1 == 2" in tests.detail
    assert broken.failed == 1
    assert "out of memory" in broken.detail
    assert silent.failed == 1
    assert "ERRORS: 2" in silent.detail
    assert dict(absent.skipped) == {"no-such-program is not on PATH": 1}
    assert (unnamed.state, unnamed.failed) == ("no test of these names", 0)
    assert unbuilt[1].state == "not begun: there is no build"
    report = (tmp_path / "report.md").read_text()
    assert "| suite: some | done | 1 | 1 | 1: for a reason |" in report
    assert "## broken failed" in report


def test_nothing_runs_without_a_device(tmp_path):
    command = [sys.executable, "-m", "tools.gpu_report", "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert "torch finds no CUDA device" in run.stdout
    assert list(tmp_path.iterdir()) == []
