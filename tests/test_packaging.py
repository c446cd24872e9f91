"""The package as users get it: what sdist and wheel hold, what the module links, what a rebuild costs.

The wheel is built once, from an sdist, in pip's ordinary isolation (so without torch). setup.py itself is tested on a
tree whose csrc/ is a few lines, with a stand-in for nvcc, because its rules do not depend on the kernels.
"""

import email
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pixcontrast_ext
from tools import processes

ROOT = Path(__file__).resolve().parents[1]
LEFT_BEHIND = ("*.so", "*.egg-info", "__pycache__", ".*", "build", "dist", "runs", "carry", "data")


def run(*command, cwd, **environment):
    """Runs a command with both streams as one; it leaves the exit code to the test."""
    environment = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return processes.run(command, one_stream=True, cwd=cwd, env=environment)


def needed(module):
    """The libraries a module names as NEEDED."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    out = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", out))


# Sdist and wheel


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree") / "pixcontrast_ext"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    built = run(sys.executable, "-m", "build", "--sdist", "--outdir", tree.parent, tree, cwd=tree)
    assert built.returncode == 0, built.stdout
    (path,) = tree.parent.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist):
    out = sdist.parent / "wheel"
    # Without the CUDA kernels, which take minutes; the module under test has them where nvcc is found.
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, sdist]
    # Not optimised either: the wheel holds and links the same.
    flags = f"{os.environ.get('CXXFLAGS', '')} -O0"
    built = run(*command, cwd=sdist.parent, PIXCONTRAST_CUDA="0", CXXFLAGS=flags)
    assert built.returncode == 0, built.stdout
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel):
    """The folder with the wheel's unpacked files, to put on sys.path."""
    folder = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_sdist_holds_what_a_build_and_the_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = (ROOT / folder for folder in ("csrc", "tests", "tools", "benchmarks", "examples"))
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    sources = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    assert (
        sources | {"Makefile", "setup.py", "pyproject.toml", "LICENSE", "pixcontrast_ext/py.typed"} <= names
    )
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith("build/")]


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "pixcontrast_ext/py.typed" in names
    assert len([name for name in names if re.fullmatch(r"pixcontrast_ext/_C\.[^/]*so", name)]) == 1
    foreign = [name for name in names if not re.match(r"pixcontrast_ext(/|-[\d.]+\.dist-info/)", name)]
    assert not foreign
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".cuh", ".pyc"))]
    packages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pixcontrast_ext").rglob("*.py")}
    recipes = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "pixcontrast_ext").rglob("recipes/*.json")
    }
    assert recipes
    assert packages | recipes <= set(names)


def test_wheel_metadata(installed):
    (path,) = installed.glob("*.dist-info/METADATA")
    metadata = email.message_from_string(path.read_text())
    requires = metadata.get_all("Requires-Dist")
    assert {line for line in requires if "extra ==" not in line} == {"torch>=2.6"}
    assert {"train", "models", "triton", "bench", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Version"] == pixcontrast_ext.__version__
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))


@pytest.mark.parametrize("of", ["the wheel", "this tree"])
def test_module_links_the_language_runtimes_only(installed, of):
    """The CUDA runtime, if needed at all, is inside the module."""
    (module,) = (installed if of == "the wheel" else ROOT).glob("pixcontrast_ext/_C.*so")
    allowed = re.compile(
        r"(libgomp|libstdc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|ld-linux.*)\.so\.\d+"
    )
    libraries = needed(module)
    assert "libgomp.so.1" in libraries
    assert not [name for name in libraries if not allowed.fullmatch(name)]


def test_an_installation_works_with_one_openmp_runtime(installed):
    ran = run(sys.executable, ROOT / "tools" / "smoke.py", cwd=installed, PYTHONPATH=installed)
    assert ran.returncode == 0, ran.stdout
    assert len(re.findall("^openmp ", ran.stdout, re.M)) == 1, ran.stdout


def test_same_module_beside_another_torch(installed):
    other = os.environ.get("PIXCONTRAST_OTHER_PYTHON")
    if not other:
        pytest.skip("PIXCONTRAST_OTHER_PYTHON names no interpreter with another torch")
    import torch

    ran = run(other, ROOT / "tools" / "smoke.py", cwd=installed, PYTHONPATH=installed)
    assert ran.returncode == 0, ran.stdout
    assert f"torch {torch.__version__}\n" not in ran.stdout


USE_EVERYTHING = """
import torch, pixcontrast_ext as pc
bank = pc.MemoryBank(3, 8, region_slots=4, pixel_slots=4)
criterion = pc.PixelContrastCrossEntropyLoss(3, bank=bank, min_pixels=1)
for _ in range(3):
    embeddings = torch.randn(2, 8, 6, 6, requires_grad=True)
    criterion(torch.randn(2, 3, 6, 6), embeddings, torch.randint(3, (2, 6, 6))).backward()
"""


# The tests' environment may have an editable installation, whose finder knows a compiled module.
WITHOUT_EDITABLE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
"""


@pytest.fixture
def clone(tmp_path):
    """A clone that was never built, and the PYTHONPATH of an environment without an editable installation."""
    tree, ignored = tmp_path / "clone", shutil.ignore_patterns(*LEFT_BEHIND)
    shutil.copytree(ROOT / "pixcontrast_ext", tree / "pixcontrast_ext", ignore=ignored)
    shutil.copy(ROOT / "setup.py", tree)
    (tree / "csrc").mkdir()
    (tree / "use.py").write_text(USE_EVERYTHING)
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_EDITABLE)
    return tree


def native_module(*command, **where):
    told = run(sys.executable, *command, **where)
    assert told.returncode == 0, told.stdout
    (line,) = re.findall(r"^native module +(.*)$", told.stdout, re.M)
    return line


def test_a_source_tree_that_hides_the_installed_package_says_so_once(clone, installed):
    """After `pip install .`, a run inside the clone, where the current folder comes first on sys.path."""
    where = dict(cwd=clone, PYTHONPATH=f"{clone.parent}:{installed}", PYTHONWARNINGS=None)
    reason = (
        f"{clone} is a source tree without the compiled module, and hides an installed package: "
        "run from another folder, or `pip install -e .` there"
    )
    assert native_module("-m", "pixcontrast_ext.info", **where) == reason
    used = run(sys.executable, "use.py", **where)
    assert used.returncode == 0, used.stdout
    assert used.stdout.count("Warning") == used.stdout.count(reason) == 1, used.stdout

    (module,) = installed.glob("pixcontrast_ext/_C.*so")
    shutil.copy(module, clone / "pixcontrast_ext")
    assert native_module("-m", "pixcontrast_ext.info", **where).startswith("built with ")
    assert run(sys.executable, "use.py", **where).stdout == ""


def test_an_installed_package_without_its_module_gives_the_reason(clone):
    (clone / "setup.py").unlink()
    line = native_module("-m", "pixcontrast_ext.info", cwd=clone, PYTHONPATH=clone.parent)
    assert line.startswith("the compiled module is missing or does not load: ")


# setup.py

TOY_SOURCES = {
    "csrc/params.h": "int answer();\n",
    # It uses Python's own C interface: pybind11's headers take seconds, and the wheel above compiles them.
    "csrc/bindings.cpp": """
        #include <Python.h>
        #include "params.h"
        #ifndef PXC_HAVE_CUDA
        #define PXC_HAVE_CUDA 0
        #endif
        static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                         nullptr, nullptr, nullptr, nullptr};
        PyMODINIT_FUNC PyInit__C() {
          PyObject* module = PyModule_Create(&definition);
          PyModule_AddIntConstant(module, "answer", answer());
          PyModule_AddIntConstant(module, "have_cuda", PXC_HAVE_CUDA);
          PyModule_AddStringConstant(module, "cuda_archs", PXC_CUDA_ARCHS);
          PyModule_AddStringConstant(module, "compiler", PXC_COMPILER);
          return module;
        }
    """,
    "csrc/cpu/isa/infonce.cpp": """
        #define JOINED(a, b) a##b
        #define NAMED(isa) JOINED(compiled_for_, isa)
        int NAMED(PXC_ISA)() { return 1; }
    """,
    "csrc/cpu/isa/infonce_fused.cpp": """
        #define JOINED(a, b) a##b
        #define NAMED(isa) JOINED(fused_for_, isa)
        int NAMED(PXC_ISA)() { return 1; }
    """,
    "csrc/cpu/sampling.cpp": '#include "../params.h"\nint answer() { return 42; }\n',
}

# Enough of nvcc for setup.py: it names a toolkit, lists two architectures and compiles with g++.
STAND_IN_NVCC = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *--dryrun*) echo '#$ TOP={top}' >&2 ;;
  *--list-gpu-code*) echo sm_75; echo sm_90; echo sm_90a ;;
  *--version*) echo 'Cuda compilation tools, release 12.9, V12.9.1' ;;
  *) while [ $# -gt 0 ]; do
       case "$1" in
         -o) object=$2; shift ;;
         -MF) depfile=$2; shift ;;
         *.cu) source=$1 ;;
       esac
       shift
     done
     g++ -fPIC -x c++ -c "$source" -o "$object" && echo "$object: $source" > "$depfile" ;;
esac
"""


@pytest.fixture
def toy(tmp_path):
    """A tree with this project's setup.py and hardly any sources."""
    tree = tmp_path / "toy"
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for name, text in {**TOY_SOURCES, "pixcontrast_ext/__init__.py": '__version__ = "0"\n'}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    return tree


@pytest.fixture
def nvcc(tmp_path):
    """A toolkit with a stand-in nvcc: returns a wrapper folder outside the toolkit, and a log of every call."""
    top, wrapper = tmp_path / "toolkit", tmp_path / "wrapper"
    log = tmp_path / "nvcc.log"
    for folder in (top, wrapper):
        script = folder / "bin" / "nvcc"
        script.parent.mkdir(parents=True)
        script.write_text(STAND_IN_NVCC.format(log=log, top=top))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (top / "lib64").mkdir()
    (top / "lib64" / "libcudart_static.a").write_bytes(b"!<arch>\n")
    return wrapper, log


def build(tree, **environment):
    defaults = {"PIXCONTRAST_CUDA": None, "CUDA_HOME": None, "CXXFLAGS": None, "LDFLAGS": None}
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    return run(*command, cwd=tree, **{**defaults, **environment})


def config_of(tree):
    """The attributes of the built toy module."""
    code = "from pixcontrast_ext._C import *; print(answer, have_cuda, cuda_archs, compiler, sep='|')"
    ran = run(sys.executable, "-c", code, cwd=tree)
    assert ran.returncode == 0, ran.stdout
    return ran.stdout.strip().split("|")


def test_rebuild_compiles_only_what_changed(toy):
    first = build(toy, PIXCONTRAST_CUDA="0", MAX_JOBS="2")
    assert first.returncode == 0, first.stdout
    assert config_of(toy)[:3] == ["42", "0", ""]
    assert build(toy, PIXCONTRAST_CUDA="0").stdout.count("ninja: no work to do.") == 1

    (toy / "csrc/cpu/sampling.cpp").write_text('#include "../params.h"\nint answer() { return 43; }\n')
    assert "[2/2]" in build(toy, PIXCONTRAST_CUDA="0").stdout  # one object and the link
    assert config_of(toy)[0] == "43"

    os.utime(toy / "csrc/params.h")  # ninja knows it only from the depfiles: bindings, sampling, link
    assert "[3/3]" in build(toy, PIXCONTRAST_CUDA="0").stdout


def test_a_module_that_is_gone_is_not_installed(toy):
    """A tree is built in place by pip, and its build/ has the modules of the last time."""
    gone = toy / "pixcontrast_ext" / "folder" / "gone.py"
    gone.parent.mkdir()
    (gone.parent / "__init__.py").touch()

    def modules():
        built = run(sys.executable, "setup.py", "build_py", cwd=toy)
        assert built.returncode == 0, built.stdout
        return {path.name for path in (toy / "build").rglob("*.py")}

    gone.touch()
    assert modules() == {"__init__.py", "gone.py"}
    gone.unlink()
    assert modules() == {"__init__.py"}
    assert (toy / "pixcontrast_ext" / "__init__.py").read_text() == '__version__ = "0"\n'


def isas_of(build_file):
    """{source: the instruction sets it is compiled for}."""
    found = {}
    for source, isa in re.findall(r"/cpu/isa/(\w+)\.cpp\n  flags = -DPXC_ISA=(\w+)", build_file.read_text()):
        found.setdefault(source, set()).add(isa)
    return found


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="AVX-512 is of x86")
def test_a_compiler_without_avx512_bf16_builds_the_rest(toy, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *avx512bf16*) exit 1 ;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    built = build(toy, PIXCONTRAST_CUDA="0", CXX=str(compiler))
    assert built.returncode == 0, built.stdout
    (build_file,) = toy.glob("build/native-*/build.ninja")
    assert isas_of(build_file)["infonce_fused"] == {"avx2", "avx512"}
    assert "PXC_HAVE_AVX512_BF16" not in build_file.read_text()


def test_infonce_is_compiled_per_instruction_set(toy):
    assert build(toy, PIXCONTRAST_CUDA="0").returncode == 0
    (build_file,) = toy.glob("build/native-*/build.ninja")
    isas = isas_of(build_file)
    if os.uname().machine == "x86_64":
        assert isas["infonce"] == {"portable", "avx2", "avx512"}
        assert isas["infonce_fused"] - {"avx512_bf16"} == {"avx2", "avx512"}
    else:
        assert isas == {"infonce": {"portable"}}
    assert str(toy) not in build_file.read_text()


def test_failed_compilation_is_an_error(toy):
    (toy / "csrc/cpu/sampling.cpp").write_text("#error not today\n")
    built = build(toy, PIXCONTRAST_CUDA="0")
    assert built.returncode != 0
    assert "not today" in built.stdout
    assert "ninja could not build pixcontrast_ext._C" in built.stdout


def test_missing_compiler_is_named(toy):
    built = build(toy, PIXCONTRAST_CUDA="0", CXX="no-such-compiler")
    assert built.returncode != 0
    assert "no working C++ compiler: 'no-such-compiler'" in built.stdout


def test_a_compiler_without_what_the_sources_need_is_named(toy, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("""#!/bin/sh
        case "$*" in
          *--version*) echo "g++ (old) 8.3.0" ;;
          *c++20*) echo "g++: error: unrecognized command line option '-std=c++20'" >&2; exit 1 ;;
          *) exec g++ "$@" ;;
        esac
    """)
    compiler.chmod(0o755)
    built = build(toy, PIXCONTRAST_CUDA="0", CXX=str(compiler))
    assert built.returncode != 0
    assert "g++ (old) 8.3.0 does not compile C++20" in built.stdout
    assert "unrecognized command line option '-std=c++20'" in built.stdout


def test_setuptools_that_is_too_old_is_named(toy):
    program = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    built = run(sys.executable, "-c", program, cwd=toy)
    assert built.returncode != 0
    assert "pixcontrast_ext is built with setuptools 77 or newer, found 65.5.0" in built.stdout


def test_the_version_is_the_same_everywhere():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited[1] == pixcontrast_ext.__version__
    assert f"({pixcontrast_ext.__version__})" in (ROOT / "CHANGELOG.md").read_text()


def test_cuda_demanded_without_nvcc(toy, tmp_path):
    (tmp_path / "empty").mkdir()
    built = build(toy, PIXCONTRAST_CUDA="1", PATH=str(tmp_path / "empty"))
    assert built.returncode != 0
    assert "PIXCONTRAST_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor on PATH" in built.stdout


def test_cuda_left_out_never_calls_nvcc(toy, nvcc):
    wrapper, log = nvcc
    (toy / "csrc/cuda").mkdir()
    (toy / "csrc/cuda/empty.cu").write_text("int from_cuda() { return 1; }\n")
    path = f"{wrapper / 'bin'}:{os.environ['PATH']}"
    built = build(toy, PIXCONTRAST_CUDA="0", CUDA_HOME=str(wrapper), PATH=path)
    assert built.returncode == 0, built.stdout
    assert "building for the CPU only, because PIXCONTRAST_CUDA=0" in built.stdout
    assert not log.exists()


def test_bad_cuda_setting_is_named(toy):
    built = build(toy, PIXCONTRAST_CUDA="yes")
    assert built.returncode != 0
    assert "PIXCONTRAST_CUDA must be 0, 1 or unset, got 'yes'" in built.stdout


def test_without_cuda_sources_it_is_a_cpu_build(toy, nvcc):
    wrapper, _ = nvcc
    for wish in (None, "1"):
        built = build(toy, PIXCONTRAST_CUDA=wish, CUDA_HOME=str(wrapper))
        assert built.returncode == 0, built.stdout
        assert "building for the CPU only, because there are no csrc/cuda/*.cu" in built.stdout


def test_cuda_sources_are_compiled_for_what_nvcc_lists(toy, nvcc):
    wrapper, log = nvcc
    (toy / "csrc/cuda").mkdir()
    (toy / "csrc/cuda/sampling.cu").write_text("int from_cuda() { return 1; }\n")
    path = f"{wrapper / 'bin'}:{os.environ['PATH']}"
    built = build(toy, PATH=path)
    assert built.returncode == 0, built.stdout
    answer, have_cuda, archs, compiler = config_of(toy)
    assert (answer, have_cuda, archs) == ("42", "1", "sm_90 compute_90")
    assert compiler.endswith("nvcc 12.9")
    compiled = log.read_text().splitlines()[-1]
    assert "-gencode=arch=compute_90,code=[sm_90,compute_90]" in compiled
    assert "--cudart=static" in compiled
    assert "-fPIC" in compiled
    assert "ninja: no work to do." in build(toy, PATH=path).stdout


def test_an_nvcc_that_is_too_old_is_left_alone_whatever_else_it_lacks(toy, nvcc, tmp_path):
    """It lists no architectures and has its runtime elsewhere."""
    wrapper, _ = nvcc
    (toy / "csrc/cuda").mkdir()
    (toy / "csrc/cuda/sampling.cu").write_text("int from_cuda() { return 1; }\n")
    for script in tmp_path.glob("*/bin/nvcc"):
        old = script.read_text().replace("release 12.9, V12.9.1", "release 11.0, V11.0.1")
        script.write_text(old.replace("echo sm_75; echo sm_90; echo sm_90a", "exit 1"))
    (tmp_path / "toolkit/lib64/libcudart_static.a").unlink()
    path = f"{wrapper / 'bin'}:{os.environ['PATH']}"
    built = build(toy, PATH=path)
    assert built.returncode == 0, built.stdout
    assert "is of CUDA 11.0, and C++20 needs" in built.stdout
    built = build(toy, PATH=path, PIXCONTRAST_CUDA="1")
    assert built.returncode != 0
    assert "PIXCONTRAST_CUDA=1, but" in built.stdout


def test_the_module_is_that_of_the_build_folder_whichever_is_newer(toy):
    source = toy / "csrc/cpu/sampling.cpp"
    for folder, answer in (("build/old", 42), ("build/new", 43), ("build/old", 42)):
        source.write_text(f'#include "../params.h"\nint answer() {{ return {answer}; }}\n')
        os.utime(source, (1, 1))  # ninja, which goes by times, finds nothing new
        built = build(toy, PIXCONTRAST_CUDA="0", PIXCONTRAST_BUILD_DIR=folder)
        assert built.returncode == 0, built.stdout
        assert config_of(toy)[0] == str(answer)


def test_cuda_sources_are_compiled_for_what_is_asked(toy, nvcc):
    wrapper, log = nvcc
    (toy / "csrc/cuda").mkdir()
    (toy / "csrc/cuda/sampling.cu").write_text("int from_cuda() { return 1; }\n")
    path = f"{wrapper / 'bin'}:{os.environ['PATH']}"
    built = build(toy, PATH=path, PIXCONTRAST_CUDA_ARCHS="90")
    assert built.returncode == 0, built.stdout
    assert "code=[sm_90,compute_90]" in log.read_text().splitlines()[-1]
    for wish in ("75", "90a", "80", "native", ","):
        built = build(toy, PATH=path, PIXCONTRAST_CUDA_ARCHS=wish)
        assert built.returncode != 0
        assert f"PIXCONTRAST_CUDA_ARCHS={wish!r}, expected some of 90 (" in built.stdout


@pytest.mark.parametrize("place", ["lib64", "targets/x86_64-linux/lib", "lib"])
def test_the_runtime_is_found_where_toolkits_have_it(toy, nvcc, tmp_path, place):
    wrapper, _ = nvcc
    (toy / "csrc/cuda").mkdir()
    (toy / "csrc/cuda/sampling.cu").write_text("int from_cuda() { return 1; }\n")
    toolkit, folder = tmp_path / "toolkit", tmp_path / "toolkit" / place
    (toolkit / "lib64" / "libcudart_static.a").rename(tmp_path / "libcudart_static.a")
    (toolkit / "lib64").rmdir()
    path = f"{wrapper / 'bin'}:{os.environ['PATH']}"
    built = build(toy, PATH=path)
    assert built.returncode != 0
    assert f"no libcudart_static.a below {toolkit}" in built.stdout
    folder.mkdir(parents=True)
    (tmp_path / "libcudart_static.a").rename(folder / "libcudart_static.a")
    built = build(toy, PATH=path)
    assert built.returncode == 0, built.stdout


def test_editable_installation_keeps_its_objects(toy, tmp_path):
    """Each of pip's isolated builds has a new environment, and still the second one compiles nothing."""
    site = tmp_path / "site"
    command = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "-v",
        "--no-deps",
        "--target",
        site,
        "--upgrade",
        "-e",
        ".",
    )
    first = run(*command, cwd=toy, PIXCONTRAST_CUDA="0")
    assert first.returncode == 0, first.stdout
    assert list((toy / "pixcontrast_ext").glob("_C.*so"))
    assert "ninja: no work to do." in run(*command, cwd=toy, PIXCONTRAST_CUDA="0").stdout
