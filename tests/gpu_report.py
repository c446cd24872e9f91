"""Everything that a GPU can show, in one run: `make gpu`.

Runs the whole test-suite with the kernels on the device, the tests that need one, compute-sanitizer over small shapes,
and the timings; prints a table of what ran, passed, failed and was skipped and why, and writes it with device, driver,
versions and commit to benchmarks/results/. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TIMED = ["infonce", "sampling", "gather", "enqueue", "training_step", "--shapes", "quick", "cityscapes"]


@dataclass
class Step:
    name: str
    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    seconds: float = 0.0
    detail: str = ""  # of a failure


def run(command: list[str], limit: int, **environment: str) -> tuple[int, str]:
    # The checkout, not an installed copy.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        **environment,
    }
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        return 124, f"{output}\ncut off after {limit} s"
    return done.returncode, done.stdout


def pytest_step(name: str, arguments: list[str], limit: int) -> Step:
    step, report = Step(name), ROOT / "build" / "gpu-report.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        *arguments,
    ]
    code, output = run(command, limit, PIXCONTRAST_TEST_CUDA="device")
    step.seconds = time.perf_counter() - start
    if not report.exists():
        step.failed, step.detail = 1, output[-3000:]
        return step
    for case in ElementTree.parse(report).iter("testcase"):
        if (skip := case.find("skipped")) is not None:
            step.skipped[skip.get("message") or "no reason"] += 1
        elif (failure := case.find("failure")) is not None or (failure := case.find("error")) is not None:
            step.failed += 1
            step.detail += (
                f"{case.get('classname')}::{case.get('name')}: {(failure.get('message') or '')[:300]}\n"
            )
        else:
            step.passed += 1
    if (code not in (0, 1) and not step.failed) or step.passed + step.failed + sum(
        step.skipped.values()
    ) == 0:
        step.failed, step.detail = 1, output[-3000:]
    return step


def sanitizer_step(tool: str, backend: str, limit: int) -> Step:
    step = Step(f"compute-sanitizer {tool}, {backend}")
    if shutil.which("compute-sanitizer") is None:
        step.skipped["compute-sanitizer is not on PATH"] += 1
        return step
    start = time.perf_counter()
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "tests/gpu_small.py",
        backend,
    ]
    # Every tensor its own allocation, so that reading past one is seen.
    code, output = run(command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    step.seconds = time.perf_counter() - start
    clean = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    if code == 0 and clean in output:
        step.passed = 1
    else:
        step.failed, step.detail = 1, output[-3000:]
    return step


def benchmark_step(limit: int, results: Path) -> tuple[Step, str]:
    step = Step("timings")
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--seconds", "2", *TIMED]
    code, output = run([*command, "--csv", str(results)], limit)
    step.seconds = time.perf_counter() - start
    step.passed, step.failed = int(code == 0), int(code != 0)
    step.detail = "" if code == 0 else output[-3000:]
    return step, output


def facts() -> dict[str, str]:
    def output(*command: str) -> str:
        try:
            return subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    from pixcontrast_ext.backends import native

    major, minor = torch.cuda.get_device_capability()
    changed = output("git", "status", "--porcelain", "--untracked-files=no") not in ("", "unknown")
    return {
        "device": f"{torch.cuda.get_device_name()} (sm_{major}{minor})",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[
            0
        ],
        "torch": torch.__version__,
        "python": sys.version.partition(" ")[0],
        "module": f"{native._C.compiler} for {native._C.cuda_archs}",
        "commit": output("git", "rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "date": datetime.date.today().isoformat(),
    }


def table(steps: list[Step]) -> str:
    lines = ["| step | passed | failed | skipped | seconds |", "|---|---|---|---|---|"]
    for step in steps:
        skipped = "; ".join(f"{count}: {reason}" for reason, count in step.skipped.items()) or "0"
        lines.append(f"| {step.name} | {step.passed} | {step.failed} | {skipped} | {step.seconds:.0f} |")
    return "\n".join(lines)


PARTS = ("device", "timings", "sanitizers", "suite")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all unless told")
    parser.add_argument("--limit", type=int, default=900, help="seconds that one step may take")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    parts, limit = arguments.parts or PARTS, arguments.limit
    if not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA device")
        return 2
    about = facts()
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = arguments.out / f"{about['date']}-{slug}"
    folder.mkdir(parents=True, exist_ok=True)
    steps, figures = [], ""
    if "device" in parts:
        steps.append(pytest_step("device tests", ["tests/test_cuda_device.py"], limit))
        steps.append(
            pytest_step("conformance of the primitives", ["tests/test_emulator.py", "-k", "device"], limit)
        )
    if "timings" in parts:
        timings, figures = benchmark_step(limit, arguments.out / f"{slug}.csv")
        steps.append(timings)
    if "sanitizers" in parts:
        tools = ("memcheck", "racecheck", "initcheck", "synccheck")
        steps += [sanitizer_step(tool, name, limit) for name in ("cuda", "triton") for tool in tools]
    if "suite" in parts:
        steps.append(pytest_step("whole suite, kernels on the device", ["tests"], limit))
    text = "\n".join(
        [
            f"# What ran on {about['device']}",
            "",
            *(f"- {key}: {value}" for key, value in about.items()),
            "",
            table(steps),
            "",
            *(f"## {step.name} failed\n\n```\n{step.detail}\n```\n" for step in steps if step.failed),
            *(["## Timings", "", "```", figures, "```"] if figures else []),
            "",
        ]
    )
    (folder / "report.md").write_text(text)
    print(text)
    print(f"written to {folder}")
    return int(any(step.failed for step in steps))


if __name__ == "__main__":
    sys.exit(main())
