"""How `make test` runs its parts: progress on the way, full output of those that fail, one total at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAKEFILE = """
good:
\t@echo "tests/test_a.py ..... [ 50%]"
\t@echo "tests/test_b.py ..... [100%]"
\t@echo "34.56s call     tests/test_b.py::test_slow"
\t@echo "SKIPPED [1] tests/test_b.py:3: there is no device"
\t@echo "======== 10 passed, 1 skipped, 4 deselected in 3.21s ========"
\t@echo "7 passed in 0.50s"
bad:
\t@echo "the whole story"
\t@echo "=== 2 failed, 1 passed in 100.00s (0:01:40) ==="
\t@exit 3
"""


def run(tmp_path: Path, *names: str) -> subprocess.CompletedProcess:
    (tmp_path / "Makefile").write_text(MAKEFILE)
    return subprocess.run(
        [sys.executable, "-m", "tools.parts", *names],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_progress_and_the_sum_of_all_parts(tmp_path):
    done = run(tmp_path, "good", "good")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stdout.count("good                  50 %")
        == done.stdout.count("good                 100 %")
        == 2
    )
    assert done.stdout.count("--- good passed in") == 2
    assert "the whole story" not in done.stdout
    assert done.stdout.count("SKIPPED [1] tests/test_b.py:3: there is no device") == 2
    assert done.stdout.count("34.56s call     tests/test_b.py::test_slow") == 2
    assert "2 parts: 34 passed, 2 skipped, 8 deselected; " in done.stdout


def test_a_part_that_fails_is_shown_whole_and_does_not_hide_the_others(tmp_path):
    done = run(tmp_path, "bad", "good")
    assert done.returncode == 1
    assert "--- bad FAILED" in done.stdout
    assert "the whole story" in done.stdout
    assert "--- good passed" in done.stdout
    assert "2 failed, 18 passed" in done.stdout
    assert done.stdout.rstrip().endswith("FAILED: bad")


def test_parts_know_the_variables_of_the_whole(tmp_path):
    (tmp_path / "Makefile").write_text(
        f'all:\n\t@{sys.executable} -m tools.parts part\npart:\n\t@test "$(SHARE)" = 3 && echo "1 passed in 1.00s"\n'
    )
    command = ["make", "all", "SHARE=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
