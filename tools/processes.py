"""Runs other programs for tests and tools, and ends them if they hang.

The time limit is far longer than any of them takes, even on a busy machine, because no test may depend on timing.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Iterable
from typing import Any

LIMIT = float(os.environ.get("PIXCONTRAST_TEST_LIMIT", "1800"))  # seconds


def overdue(what: str, output: str) -> TimeoutError:
    return TimeoutError(
        f"{what} was still running after {LIMIT:.0f} s. If its last lines, below, show that it was getting on, the "
        "machine is too busy: repeat this test alone, or set PIXCONTRAST_TEST_LIMIT to more seconds. If not, it hangs."
        f"\n{output[-4000:]}"
    )


def run(
    command: Iterable[object], *, one_stream: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` with the output as text; standard error is part of it or separate.

    Raises:
        TimeoutError: after LIMIT seconds, once the process and all that it started have been killed.
    """
    words = [str(word) for word in command]
    errors_to = subprocess.STDOUT if one_stream else subprocess.PIPE
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=errors_to, text=True, start_new_session=True, **options
    )
    try:
        output, errors = process.communicate(timeout=LIMIT)
    except BaseException as error:  # an interrupt must not leave a process running either
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise overdue(shlex.join(words), output + (errors or "")) from None
        raise
    return subprocess.CompletedProcess(words, process.returncode, output, errors)
