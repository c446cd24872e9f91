"""Builds ``pixcontrast_ext._C`` by writing a ninja file for ``csrc/`` and running it.

Ninja instead of setuptools' own compiler driver because a rebuild should compile only what changed, on all
cores, and because one source is compiled once per instruction set. Nothing here imports or links torch.

Environment: ``CXX``, ``CXXFLAGS``, ``LDFLAGS``; ``MAX_JOBS`` (parallel compilations); ``CUDA_HOME``;
``PIXCONTRAST_CUDA`` (``1``: nvcc must be there, ``0``: leave CUDA out, unset: use nvcc if found);
``PIXCONTRAST_CUDA_ARCHS`` (such as ``80 90``: machine code for these only, instead of all supported ones);
``PIXCONTRAST_DEBUG=1`` (keep symbols and line numbers); ``PIXCONTRAST_BUILD_DIR`` (where the objects go).
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import setuptools

OLDEST_SETUPTOOLS = 77  # older ones do not know all that pyproject.toml says
if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"pixcontrast_ext is built with setuptools {OLDEST_SETUPTOOLS} or newer, found {setuptools.__version__}. "
        "pip 19 or newer gets it by itself (python -m pip install --upgrade pip), unless told --no-build-isolation "
        "(python -m pip install --upgrade setuptools)."
    )

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402
from setuptools.errors import CompileError  # noqa: E402

ROOT = Path(__file__).resolve().parent

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
LINK_FLAGS = ["-shared", "-fopenmp", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
# Two architectures of a file at a time: one file is most of the work.
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "--cudart=static",
    "--threads=2",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
]

COMPILER_LAUNCHERS = ("ccache", "sccache", "distcc")  # CXX may begin with one

# Sources in csrc/cpu/isa are compiled once per instruction set; the choice among them is made at run time.
FUSED_SOURCES = tuple(
    f"csrc/cpu/isa/infonce_{name}.cpp" for name in ("fused", "symmetric")
)  # for some sets only
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
PORTABLE_ISAS = {"portable": ""}
X86_ISAS = {"avx2": AVX2, "avx512": AVX512}
X86_FUSED_ISAS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}

OLDEST_CUDA = 12
CUDA_ARCHS = [80, 86, 89, 90, 100, 120]  # of these, the ones that the nvcc at hand can generate


def output_of(*command: str) -> str | None:
    """Both output streams of a command, or None if it is missing or fails."""
    try:
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass
class CudaToolkit:
    nvcc: str
    version: str
    archs: list[int]  # e.g. [80, 90]
    ptx: int  # the architecture of the PTX, e.g. 80
    library_dir: str

    @property
    def targets(self) -> list[str]:
        """The code embedded: machine code for each architecture, and PTX for all others.

        All of it comes from the PTX of the lowest supported architecture: the kernels use nothing newer, and making
        PTX, half of the work for one architecture, is then done once.
        """
        return [f"sm_{arch}" for arch in self.archs] + [f"compute_{self.ptx}"]

    @property
    def gencode(self) -> list[str]:
        return [f"-gencode=arch=compute_{self.ptx},code=[{','.join(self.targets)}]"]

    @property
    def compression(self) -> list[str]:
        """A seventh of the size; every driver that CUDA 13 runs on can unpack it."""
        major = self.version.partition(".")[0]
        return ["--compress-mode=size"] if major.isdigit() and int(major) >= 13 else []


def find_cuda() -> CudaToolkit | str:
    """The toolkit, or the reason for building without it."""
    wish = os.environ.get("PIXCONTRAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise CompileError(f"PIXCONTRAST_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return "PIXCONTRAST_CUDA=0"
    if not wish and not any(ROOT.glob("csrc/cuda/*.cu")):
        return "there are no csrc/cuda/*.cu"

    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    # nvcc on PATH may be a wrapper script, so it is asked where its toolkit is.
    dryrun = output_of(nvcc, "--dryrun", "-x", "cu", os.devnull) if nvcc else None
    top = re.search(r"^#\$ TOP=(.+)$", dryrun or "", re.MULTILINE)
    if top is None:
        reason = (
            f"{nvcc} --dryrun names no toolkit" if nvcc else "nvcc is neither in CUDA_HOME/bin nor on PATH"
        )
        if wish == "1":
            raise CompileError(f"PIXCONTRAST_CUDA=1, but {reason}")
        return reason

    toolkit = Path(top.group(1)).resolve()
    nvcc = str(toolkit / "bin" / "nvcc")
    version = re.search(r"release (\d+)([\d.]*)", output_of(nvcc, "--version") or "")
    if version and int(version.group(1)) < OLDEST_CUDA:
        reason = f"{nvcc} is of CUDA {version.group(1)}{version.group(2)}, and C++20 needs {OLDEST_CUDA}"
        if wish == "1":
            raise CompileError(f"PIXCONTRAST_CUDA=1, but {reason}")
        return reason
    archs, ptx = archs_to_compile(nvcc)
    # NVIDIA's own layout, a Linux distribution's, that of the pip packages.
    places = ("lib64", "targets/*/lib", "lib")
    libraries = [path for place in places for path in toolkit.glob(f"{place}/libcudart_static.a")]
    if not libraries:
        raise CompileError(f"no libcudart_static.a below {toolkit}; set PIXCONTRAST_CUDA=0")
    return CudaToolkit(
        nvcc, "".join(version.groups()) if version else "unknown", archs, ptx, str(libraries[0].parent)
    )


def archs_to_compile(nvcc: str) -> tuple[list[int], int]:
    """The architectures to embed machine code for, and the one whose PTX all of it is compiled from."""
    known = {int(arch) for arch in re.findall(r"sm_(\d+)\b", output_of(nvcc, "--list-gpu-code") or "")}
    wish = os.environ.get("PIXCONTRAST_CUDA_ARCHS", "")
    if not wish:
        archs = [arch for arch in CUDA_ARCHS if arch in known]
        if not archs:
            raise CompileError(f"{nvcc} generates code for none of {CUDA_ARCHS}; set PIXCONTRAST_CUDA=0")
        return archs, archs[0]
    words = re.split(r"[ ,;]+", wish.strip())
    if not all(word.isdigit() and int(word) in known and int(word) >= CUDA_ARCHS[0] for word in words):
        offered = ", ".join(str(arch) for arch in sorted(known) if arch >= CUDA_ARCHS[0])
        raise CompileError(f"PIXCONTRAST_CUDA_ARCHS={wish!r}, expected some of {offered or 'none'} ({nvcc})")
    return sorted({int(word) for word in words}), min(arch for arch in known if arch >= CUDA_ARCHS[0])


def quoted(arguments: Iterable[str]) -> str:
    return " ".join(shlex.quote(argument) for argument in arguments).replace("$", "$$")


def string_macro(name: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'-D{name}="{escaped}"'


class NinjaBuild:
    """The ninja file: one line per object, each with its own flags, and the link."""

    def __init__(self, build_dir: str) -> None:
        self.build_dir = build_dir  # relative to ROOT, where ninja runs, so no absolute path gets compiled in
        self.cxx = shlex.split(os.environ.get("CXX", "g++"))
        found = find_cuda()
        self.cuda = found if isinstance(found, CudaToolkit) else None
        self.cuda_sources = self.sources("csrc/cuda/*.cu") if self.cuda else []
        if self.cuda and self.cuda_sources:
            targets = " ".join(self.cuda.targets)
            print(f"pixcontrast_ext: building with CUDA {self.cuda.version} for {targets}", flush=True)
        else:
            self.cuda = None
            reason = found if isinstance(found, str) else "there are no csrc/cuda/*.cu"
            print(f"pixcontrast_ext: building for the CPU only, because {reason}", flush=True)
        compiler = output_of(*self.cxx, "--version")
        if compiler is None:
            raise CompileError(f"no working C++ compiler: {shlex.join(self.cxx)!r} (CXX names another)")
        self.compiler = compiler.splitlines()[0]
        self.check_compiler()
        self.statements: list[str] = []

    @staticmethod
    def sources(pattern: str) -> list[str]:
        return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))

    def check_compiler(self) -> None:
        """Raises CompileError, with the compiler's word, if it lacks something that all sources need."""
        program = "#include <omp.h>\n#include <Python.h>\n#include <concepts>\nint main() {}\n"
        flags = ["-std=c++20", "-fopenmp", f"-I{sysconfig.get_path('include')}", "-fsyntax-only"]
        command = [*self.cxx, *flags, "-x", "c++", "-"]
        checked = subprocess.run(command, input=program, text=True, capture_output=True)
        if checked.returncode:
            said = next((line for line in checked.stderr.splitlines() if "error" in line), checked.stderr)
            raise CompileError(
                f"{self.compiler} does not compile C++20 (g++ does from 10 on) with OpenMP and Python's headers "
                f"(Debian's package is python3-dev): {said.strip()}"
            )

    def knows(self, feature: str) -> bool:
        """Whether the compiler generates code for an x86 feature and can ask the processor for it."""
        program = f'int main() {{ return __builtin_cpu_supports("{feature}"); }}\n'
        command = [*self.cxx, f"-m{feature}", "-x", "c++", "-", "-o", os.devnull]
        return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0

    def add_object(self, rule: str, source: str, flags: Iterable[str], variant: str = "") -> str:
        target = f"{self.build_dir}/{Path(source).parent.name}_{Path(source).stem}{variant}.o"
        self.statements.append(f"build {target}: {rule} {source}\n  flags = {quoted(flags)}")
        return target

    def add_for_each(self, isas: Mapping[str, str], source: str) -> list[str]:
        """An object for each instruction set, given with its flags."""
        return [
            self.add_object("cxx", source, [f"-DPXC_ISA={isa}", *flags.split()], f"_{isa}")
            for isa, flags in isas.items()
        ]

    def pybind11_include(self) -> str:
        """A copy of pybind11's headers inside the build directory.

        Build isolation puts the headers into a new folder each time; compiled from there, the bindings would be
        recompiled by every installation.
        """
        import pybind11

        include = Path(self.build_dir) / f"pybind11-{pybind11.__version__}"
        if not (ROOT / include).is_dir():
            partial = ROOT / f"{include}.{os.getpid()}"
            shutil.copytree(pybind11.get_include(), partial)
            partial.rename(ROOT / include)
        return include.as_posix()

    def write(self) -> tuple[str, str]:
        """Writes build.ninja; returns its path and that of the module it makes."""
        isas, fused_isas = dict(PORTABLE_ISAS), dict[str, str]()
        config, features = list[str](), list[str]()
        if platform.machine() in ("x86_64", "AMD64"):
            isas |= X86_ISAS
            fused_isas |= X86_FUSED_ISAS
            if self.knows("avx512bf16"):
                features.append("-DPXC_HAVE_AVX512_BF16=1")
            else:
                del fused_isas["avx512_bf16"]
        compiler = self.compiler
        if self.cuda:
            config.append("-DPXC_HAVE_CUDA=1")
            compiler += f", nvcc {self.cuda.version}"
        config.append(string_macro("PXC_CUDA_ARCHS", " ".join(self.cuda.targets) if self.cuda else ""))
        config.append(string_macro("PXC_COMPILER", compiler))
        includes = [f"-isystem{path}" for path in (self.pybind11_include(), sysconfig.get_path("include"))]

        objects = list[str]()
        if (
            self.cuda
        ):  # first, because they take longest, and ninja begins at the top; large files instantiate most
            flags = self.cuda.gencode + self.cuda.compression
            largest_first = sorted(self.cuda_sources, key=lambda source: -(ROOT / source).stat().st_size)
            objects += [self.add_object("nvcc", source, flags) for source in largest_first]
        objects.append(self.add_object("cxx", "csrc/bindings.cpp", config + includes))
        objects += [self.add_object("cxx", source, features) for source in self.sources("csrc/cpu/*.cpp")]
        for source in self.sources("csrc/cpu/isa/*.cpp"):
            objects += self.add_for_each(fused_isas if source in FUSED_SOURCES else isas, source)
        if self.cuda:
            objects += [
                self.add_object("cxx", source, includes) for source in self.sources("csrc/cuda/*.cpp")
            ]

        module = f"{self.build_dir}/_C.so"
        libraries = list[str]()
        if self.cuda:
            libraries = [f"-L{self.cuda.library_dir}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        self.statements.append(f"build {module}: link {' '.join(objects)}\n  libraries = {quoted(libraries)}")

        debug = os.environ.get("PIXCONTRAST_DEBUG") == "1"
        cxx_flags = CXX_FLAGS + ["-g"] * debug + shlex.split(os.environ.get("CXXFLAGS", ""))
        link_flags = LINK_FLAGS + ["-Wl,-s"] * (not debug) + shlex.split(os.environ.get("LDFLAGS", ""))
        cxx = quoted(self.cxx)
        rules = [
            f"builddir = {self.build_dir}",
            "rule cxx",
            f"  command = {cxx} {quoted(cxx_flags)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} $in {quoted(link_flags)} $libraries -o $out",
        ]
        if self.cuda:
            host_compiler = next(word for word in self.cxx if Path(word).name not in COMPILER_LAUNCHERS)
            nvcc_flags = [f"-ccbin={host_compiler}", *NVCC_FLAGS] + ["-lineinfo"] * debug
            rules += [
                "rule nvcc",
                f"  command = {quoted([self.cuda.nvcc, *nvcc_flags])} $flags -MD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        path = f"{self.build_dir}/build.ninja"
        (ROOT / path).write_text("\n".join(rules + self.statements) + "\n")
        return path, module


class NinjaBuildExt(build_ext):  # type: ignore[misc]  # setuptools takes its base class from Cython if it can
    def build_extension(self, ext: Extension) -> None:
        import ninja

        # Not self.build_temp: an editable installation puts that in a temporary folder, and nothing would be
        # incremental.
        build_dir = os.environ.get(
            "PIXCONTRAST_BUILD_DIR", f"build/native-{sysconfig.get_config_var('SOABI')}"
        )
        (ROOT / build_dir).mkdir(parents=True, exist_ok=True)
        build_file, module = NinjaBuild(build_dir).write()
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", build_file]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise CompileError("ninja could not build pixcontrast_ext._C; the compiler's messages are above")
        self.mkpath(os.path.dirname(self.get_ext_fullpath(ext.name)))
        self.force = True  # whichever is newer: another build folder's may be there
        self.copy_file(str(ROOT / module), self.get_ext_fullpath(ext.name))


class FreshBuildPy(build_py):  # type: ignore[misc]  # setuptools has no types
    def run(self) -> None:
        """Leaves nothing of an earlier build, which would be installed although the source tree has it no more."""
        super().run()
        outputs = {Path(path).resolve() for path in self.get_outputs()}
        for path in (Path(self.build_lib) / "pixcontrast_ext").rglob("*"):
            if path.suffix in (".py", ".pyi", ".json") and path.resolve() not in outputs:
                path.unlink()


setup(
    ext_modules=[Extension("pixcontrast_ext._C", sources=["csrc/bindings.cpp"])],
    cmdclass={"build_ext": NinjaBuildExt, "build_py": FreshBuildPy},
)
