"""Runs targets of the Makefile, most of which call pytest, two at a time, and reports their progress.

    python -m tools.parts test-rest test-triton

It prints a line whenever a part has completed another tenth, and at least once a minute. A part that passes shows what
it skipped and its slowest tests; one that fails shows all of its output. The outcomes of all parts together come last.
"""

from __future__ import annotations

import collections
import concurrent.futures
import re
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

AT_A_TIME = 2
SILENCE = 60  # most seconds between two lines about a part

# The text between the equals signs in the last line of a run, and the percentage in the lines before.
_OUTCOMES = re.compile(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s.*$")
_PROGRESS = re.compile(r"\[ *(\d+)%\]$")


@dataclass
class Part:
    """A target and what its run has shown so far."""

    name: str
    output: list[str] = field(default_factory=list)
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    percent: int = 0
    returned: int = 1
    seconds: float = 0.0

    def run(self, tell: threading.Lock) -> Part:
        """Run it to its end."""
        start, ended = time.monotonic(), threading.Event()

        def show() -> None:
            with tell:
                print(
                    f"{self.name:20} {self.percent:3d} %  after {time.monotonic() - start:.0f} s", flush=True
                )

        def show_now_and_then() -> None:
            while not ended.wait(SILENCE):
                show()

        process = subprocess.Popen(
            ["make", "--no-print-directory", self.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        threading.Thread(target=show_now_and_then, daemon=True).start()
        for line in process.stdout:
            self.output.append(line)
            if self._read(line.rstrip()):
                show()
        self.returned, self.seconds = process.wait(), time.monotonic() - start
        ended.set()
        with tell:
            print(self.report(), flush=True)
        return self

    def _read(self, line: str) -> bool:
        """Read a line of output; returns whether it says that another tenth is done."""
        if outcomes := _OUTCOMES.match(line):
            for count, kind in re.findall(r"(\d+) (\w+)", outcomes[1]):
                self.outcomes[kind] += int(count)
        if not (progress := _PROGRESS.search(line)):
            return False
        before, self.percent = self.percent, int(progress[1])
        return self.percent // 10 != before // 10

    def report(self) -> str:
        """All of its output if it failed, otherwise what it skipped and its slowest tests."""
        text = "".join(self.output)
        if self.returned == 0:
            text = "".join(re.findall(r"^(?:SKIPPED|XFAIL|[\d.]+s (?:setup|call|teardown) ).*\n", text, re.M))
        verdict = "passed" if self.returned == 0 else f"FAILED (make returned {self.returned})"
        return f"--- {self.name} {verdict} in {self.seconds:.0f} s: {said(self.outcomes)}\n{text}"


def said(outcomes: collections.Counter[str]) -> str:
    """The outcomes as text, in pytest's order."""
    return ", ".join(f"{count} {kind}" for kind, count in outcomes.items()) or "no test was run"


def main(names: list[str]) -> int:
    """Run the named parts; returns 1 if one fails."""
    tell, total = threading.Lock(), collections.Counter[str]()
    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
        parts = list(pool.map(lambda name: Part(name).run(tell), names))
    for part in parts:
        total += part.outcomes
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{len(parts)} parts: {said(total)}; {(used.ru_utime + used.ru_stime) / 60:.1f} minutes of CPU time"
    )
    failed = [part.name for part in parts if part.returned]
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
