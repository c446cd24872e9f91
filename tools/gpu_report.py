"""Everything that a GPU can show: `make gpu`, whole or in calls that fit the time at hand.

It builds the module for the device and then runs these parts: `device`, the tests that need a device; `timings`, the
benchmarks and a profile of the two passes; `sanitize`, compute-sanitizer over small shapes; `suite`, the tests of the
backends with the kernels on the device. Any of them may be named. After every step it prints a line and rewrites the
report: what each step showed, what was skipped and why, and what has not begun. A run that is killed leaves the report
up to that point, and a log of each step. The exit code is 1 if anything failed.

    make gpu PARTS="device sanitize --budget 540 --out results"
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("device", "timings", "sanitize", "suite")
# The longest first.
SUITE = (
    "ops",
    "infonce_accuracy",
    "infonce_tiles",
    "infonce",
    "mining",
    "triton_infonce",
    "triton_mining",
    "triton",
    "enqueue",
    "gather",
    "loss",
    "loss_criterion",
    "loss_training",
    "regressions",
    "properties",
    "sampling",
    "bank",
)
BACKENDS = ("cuda", "triton")
ONLY = {
    "infonce_tiles": "cuda",
    "triton_infonce": "triton",
    "triton_mining": "triton",
    "triton": "triton",
}  # files that test one backend only
TIMINGS = (  # op, shape, dtypes, minimum of seconds it takes; the most important first
    ("infonce", "cityscapes", ("bf16",), 40),
    ("infonce", "cityscapes-one-view", ("bf16",), 30),
    ("infonce", "cityscapes", ("fp32", "tf32"), 60),
    ("enqueue", "cityscapes", ("fp32", "bf16"), 30),
    ("sampling", "cityscapes", (), 20),
    ("gather", "cityscapes", ("fp32",), 20),
    ("training_step", "cityscapes", (), 30),
    ("mining", "cityscapes", ("bf16", "fp32"), 60),
    ("infonce", "in-batch", ("bf16",), 30),
    ("infonce", "quick", ("bf16", "fp32"), 40),
)
SECTIONS = (  # of Nsight Compute
    "SpeedOfLight",  # the share of each peak
    "ComputeWorkloadAnalysis",  # of each pipe
    "MemoryWorkloadAnalysis_Tables",  # traffic in shared memory
    "LaunchStats",  # registers
    "Occupancy",  # blocks per multiprocessor
    "SchedulerStats",
    "WarpStateStats",  # why warps wait
)
LONGEST = 1800.0  # seconds that a step may take where no budget ends it
# The tests that need a device, in shares: the first fills its memory, the others take about equally long.
SHARES = ("2_to_the_31", "against_double", "not against_double and not 2_to_the_31")


@dataclass
class Step:
    part: str
    name: str
    command: list[str]
    needs: float  # seconds; with fewer left the step does not begin
    environment: dict[str, str] = field(default_factory=dict)
    shows: str = ""  # a pattern in its output if all is well
    missing: str = ""  # why it cannot run here
    quoted: bool = False  # the report quotes its output
    # The outcome.
    state: str = "not begun"
    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    seconds: float = 0.0
    detail: str = ""  # of a failure

    @property
    def is_alone(self) -> bool:
        """Whether steps beside it would change its result, depend on it, or take its memory."""
        return self.part in ("build", "timings") or self.name.endswith(f", {SHARES[0]}")

    @property
    def is_tests(self) -> bool:
        return "pytest" in self.command

    def line(self) -> str:
        skipped = "; ".join(f"{count}: {reason}" for reason, count in list(self.skipped.items())) or "0"
        figures = f"{self.passed} | {self.failed} | {skipped} | {self.seconds:.0f}"
        return f"| {self.part}: {self.name} | {self.state} | {figures} |"


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def tests(part: str, name: str, backend: str, needs: float, *arguments: str) -> Step:
    command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tools.gpu_log", *arguments)
    return Step(part, name, command, needs, {"PIXCONTRAST_TEST_BACKENDS": backend})


def without(program: str) -> str:
    return "" if shutil.which(program) else f"{program} is not on PATH"


def device_steps(suite: list[str], tests_named: str, csv: Path) -> Iterator[Step]:
    """All steps on a GPU, the most important first."""
    major, minor = torch.cuda.get_device_capability()
    yield Step(
        "build",
        f"the module for sm_{major}{minor}",
        python("setup.py", "--quiet", "build_ext", "--inplace"),
        needs=60,
        environment={"PIXCONTRAST_CUDA": "1", "PIXCONTRAST_CUDA_ARCHS": f"{major}{minor}"},
    )
    for share in SHARES:
        for backend in BACKENDS:
            name, file = f"what needs one, {backend}, {share}", "tests/test_cuda_device.py"
            yield tests("device", name, backend, 60, file, "-k", share)
    yield tests(
        "device", "conformance of the primitives", "cuda", 30, "tests/test_emulator.py", "-k", "device"
    )
    command = python("-m", "benchmarks", "--device", "cuda", "--seconds", "2", "--csv", str(csv))
    for op, shape, dtypes, needs in TIMINGS:
        of_dtypes = ["--dtypes", *dtypes] if dtypes else []
        name = " ".join((op, shape, *dtypes))
        yield Step("timings", name, [*command, op, "--shapes", shape, *of_dtypes], needs, quoted=True)
    for backend in BACKENDS:
        yield Step(
            "timings",
            f"profile of both passes, {backend}",
            ["ncu", "--clock-control", "none", "--kernel-name", "regex:infonce_fwd"]
            + [word for section in SECTIONS for word in ("--section", section)]
            + python("-m", "tools.gpu_small", backend, "--one-forward"),
            needs=30,
            shows="infonce_fwd",
            missing=without("ncu"),
            quoted=True,
        )
    for tool, clean in (
        ("memcheck", "ERROR SUMMARY: 0 errors"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards"),
    ):
        for backend in BACKENDS:
            missing = without("compute-sanitizer")
            if (tool, backend) == ("racecheck", "triton"):
                missing = "a reduction of Triton's writes what several threads hold from each of them"
            yield Step(
                "sanitize",
                f"{tool}, {backend}",
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
                # Triton asks the driver for attributes that the driver may not have.
                + ["--report-api-errors", "no"] * (backend == "triton")
                + python("-m", "tools.gpu_small", backend),
                needs=60,
                # Gives every tensor an allocation of its own, so that a read past its end is reported.
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                shows=clean,
                missing=missing,
            )
    yield from suite_steps(suite, tests_named, needs=20)


def suite_steps(suite: list[str], tests_named: str, needs: float) -> Iterator[Step]:
    for backend in reversed(BACKENDS):  # Triton's compiling takes longest
        wanted = f"{backend} and ({tests_named})" if tests_named else backend
        for name in suite:
            if ONLY.get(name, backend) != backend:
                continue
            file = f"tests/test_{name}.py"
            yield tests("suite", f"test_{name}, {backend}", backend, needs, file, "-k", wanted)


def rehearsal_steps(suite: list[str], tests_named: str, csv: Path) -> Iterator[Step]:
    """The same parts at small shapes, with the emulator and Triton's interpreter instead of a device."""
    yield Step("build", "the emulator", python("-m", "tools.emulator.build", "plain"), needs=5)
    for backend in BACKENDS:
        yield tests("device", f"what needs one, {backend}", backend, 1, "tests/test_cuda_device.py")
    primitives = ("tests/test_emulator.py", "-k", "machine or emulator-")
    yield tests("device", "conformance of the primitives", "cuda", 5, *primitives)
    command = python(
        "-m", "tools.emulated", "benchmarks", "--device", "cpu", "--no-memory", "--seconds", "0.1"
    )
    command += ["--rounds", "2", "2", "--dtypes", "fp32", "--csv", str(csv)]
    for op, shape in (("infonce", "A16-K32-D16-C2"), ("gather", "B1-D16-H8-W16-C3-A32")):
        yield Step("timings", f"{op} {shape}", [*command, op, "--shapes", shape], needs=5, quoted=True)
    for backend in BACKENDS:
        yield Step("sanitize", backend, python("-m", "tools.gpu_small", backend, "--emulated"), needs=5)
    yield from suite_steps(suite, tests_named, needs=5)


LIBC = ctypes.CDLL(None)  # loaded here, as another thread may hold a lock between fork and exec


def die_with_parent() -> None:
    """Makes a step end with its parent, so that a run that is killed leaves no step running."""
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Run:
    """Runs the steps and keeps the report."""

    def __init__(
        self, steps: list[Step], folder: Path, about: dict[str, str], budget: float | None, jobs: int = 1
    ):
        self.steps, self.folder, self.about, self.jobs = steps, folder, about, jobs
        self.broken = ""  # why nothing can run any more
        self.writing = threading.Lock()
        self.end = None if budget is None else time.monotonic() + budget

    def left(self) -> float | None:
        return None if self.end is None else self.end - time.monotonic()

    def go(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for alone, steps in groupby(self.steps, lambda step: step.is_alone):
            with ThreadPoolExecutor(1 if alone else self.jobs) as pool:
                list(pool.map(self.take, steps))
        self.pack()

    def pack(self) -> None:
        """Puts what the steps wrote into one file: some machines give back only a few."""
        written = sorted(self.folder.glob("[0-9][0-9]-*"))
        with tarfile.open(self.folder / "logs.tar.gz", "w:gz") as archive:
            for path in written:
                archive.add(path, path.name)
        for path in written:
            path.unlink()

    def take(self, step: Step) -> None:
        left = self.left()
        if self.broken:
            step.state = f"not begun: {self.broken}"
        elif step.missing:
            step.state, step.skipped[step.missing] = "not begun", 1
        elif left is not None and left < step.needs:
            step.state = f"not begun: it needs about {step.needs:.0f} s, {max(left, 0):.0f} s are left"
        else:
            step.state = "running"
            self.write()
            name = re.sub(r"[^a-z0-9]+", "-", step.name.lower())
            self.perform(step, self.folder / f"{self.steps.index(step):02}-{name}")
        if step.part == "build" and not step.passed:
            self.broken = "there is no build"
        self.write()
        print(step.line() + ("\n" + step.detail if step.failed else ""), flush=True)

    def perform(self, step: Step, log: Path) -> None:
        outcomes = log.with_suffix(".jsonl")
        environment = {
            **os.environ,
            # An older assembler turns Triton off on sm_90, and a machine without a network may have one.
            "PIXCONTRAST_TRITON_ANY_ASSEMBLER": "1",
            # Use the checkout, not an installed copy.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **step.environment,
            "PIXCONTRAST_TEST_LOG": str(outcomes),
        }
        outcomes.unlink(missing_ok=True)
        start = time.monotonic()
        with log.with_suffix(".log").open("w+") as output:
            running = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            left = self.left()
            try:
                code = running.wait(LONGEST if left is None else max(left - 2, 1))
                step.state = "done"
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                code = running.wait()
                step.state = "cut off at the end of the budget"
                if left is None:  # it hangs
                    step.state, step.failed = f"cut off after {LONGEST:.0f} s", 1
            step.seconds = time.monotonic() - start
            output.seek(0)
            text = output.read()
        if step.is_tests:
            self.count(step, outcomes, code, text)
        elif step.state == "done":
            well = code == 0 and re.search(step.shows, text) is not None
            if not well and "ERR_NVGPUCTRPERM" in text:
                step.skipped["the driver lets no one but root read the counters"] = 1
                return
            step.passed, step.failed = int(well), int(not well)
            step.detail = "" if well else f"exit code {code}\n{text[-3000:]}"
        if step.state.startswith("cut off"):
            step.detail = step.detail or text[-3000:]  # where it was
        elif step.quoted:
            step.detail = step.detail or text

    @staticmethod
    def count(step: Step, outcomes: Path, code: int, text: str) -> None:
        lines = outcomes.read_text().splitlines() if outcomes.exists() else []
        for line in lines:
            try:
                outcome = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was cut off
                continue
            if outcome["outcome"] == "passed":
                step.passed += 1
            elif outcome["outcome"] == "skipped":
                step.skipped[outcome["why"].removeprefix("Skipped: ")] += 1
            else:
                step.failed += 1
                if step.failed <= 5:
                    step.detail += f"{outcome['test']}\n{outcome['why'][-1500:]}\n"
        if step.state == "done" and code == 5 and not step.skipped:
            step.state = "no test of these names"
        elif step.state == "done" and not step.failed and code not in (0, 1, 5):
            step.failed, step.detail = 1, f"exit code {code}\n{text[-3000:]}"

    def write(self) -> None:
        """Writes the report, whole or not at all, whenever the run may end."""
        with self.writing:
            self._write()

    def _write(self) -> None:
        lines = [f"# What ran on {self.about['device']}", ""]
        lines += [f"- {key}: {value}" for key, value in self.about.items()]
        lines += ["", "| step | state | passed | failed | skipped | seconds |", "|---|---|---|---|---|---|"]
        lines += [step.line() for step in self.steps]
        for step in self.steps:
            if step.detail:
                title = f"{step.name} failed" if step.failed else step.name
                lines += ["", f"## {title}", "", "```", step.detail.strip("\n"), "```"]
        partial = self.folder / "report.partial"
        partial.write_text("\n".join(lines) + "\n")
        partial.replace(self.folder / "report.md")


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def driver() -> str:
    module = Path("/proc/driver/nvidia/version")
    named = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if named:
        return named.partition("\n")[0]
    found = re.search(r"\s(\d+\.\d+[.\d]*)\s", module.read_text()) if module.exists() else None
    return found.group(1) if found else "unknown"


def facts(rehearsed: bool) -> dict[str, str]:
    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    commit = output_of("git", "rev-parse", "--short", "HEAD") or "unknown"
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no") != ""
    device = "the emulator and Triton's interpreter, a rehearsal"
    if not rehearsed:
        properties = torch.cuda.get_device_properties(0)
        device = f"{properties.name} (sm_{properties.major}{properties.minor})"
    return {
        "device": device,
        "driver": "none" if rehearsed else driver(),
        "torch": torch.__version__,
        "Triton": installed("triton"),
        "Python": sys.version.partition(" ")[0],
        "nvcc": (re.findall(r"release ([\d.]+)", output_of("nvcc", "--version")) or ["none"])[0],
        "commit": commit + (" with changes" if changed else ""),
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all unless told")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begin nothing that no longer fits, and be done by then",
    )
    jobs = max((os.cpu_count() or 1) // 2, 1)
    parser.add_argument(
        "--jobs",
        type=int,
        default=jobs,
        help="steps at a time, but one where times are taken (default: %(default)s)",
    )
    results = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--out", type=Path, default=results, help="folder of the report (default: $OUT if set)"
    )
    parser.add_argument("--suite", nargs="+", default=SUITE, choices=SUITE, help="the files of that part")
    parser.add_argument(
        "--tests", default="", metavar="NAMES", help="those of its tests, as pytest -k takes them"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="with the emulator and Triton's interpreter instead of a device",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not arguments.rehearse and not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA device; PARTS=--rehearse goes through every part without one")
        return 2
    if home := os.environ.get("CUDA_HOME"):
        os.environ["PATH"] = os.pathsep.join([str(Path(home) / "bin"), os.environ["PATH"]])
    about = facts(arguments.rehearse)
    slug = re.sub(r"[^a-z0-9]+", "-", about["device"].partition(" (")[0].lower()).strip("-")
    slug = "rehearsal" if arguments.rehearse else slug
    out, parts = arguments.out.absolute(), arguments.parts or PARTS
    steps_of = rehearsal_steps if arguments.rehearse else device_steps
    planned = steps_of(arguments.suite, arguments.tests, out / f"{slug}.csv")
    steps = [step for step in planned if step.part in ("build", *parts)]
    for step in steps:
        kind = {"TRITON_INTERPRET": "1"} if arguments.rehearse else {"PIXCONTRAST_TEST_CUDA": "device"}
        step.environment = kind | step.environment
    folder = out / f"{about['date']}-{slug}-{'-'.join(parts) if arguments.parts else 'all'}"
    run = Run(steps, folder, about, arguments.budget, max(arguments.jobs, 1))
    run.go()
    print(f"written to {folder / 'report.md'}")
    return int(any(step.failed for step in steps))


if __name__ == "__main__":
    sys.exit(main())
