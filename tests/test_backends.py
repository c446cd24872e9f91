"""The registry of backends, and the rule for which module may import which."""

from __future__ import annotations

import ast
import collections
import itertools
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pixcontrast_ext
from pixcontrast_ext import available_backends, backends, infonce, use_backend
from pixcontrast_ext.backends import cuda, native, precision, splits
from pixcontrast_ext.backends import device as devices
from pixcontrast_ext.info import report
from tests.support.backends import GPU_BACKENDS, ON_DEVICE, outside_of_the_share

ROWS, LABELS = torch.randn(6, 4), torch.arange(6) % 2
PACKAGE = Path(pixcontrast_ext.__file__).parent


def served_by(**arguments) -> str:
    """The name of the backend that a call reaches."""
    seen = []
    names = ("reference", "cpu")
    modules = {name: backends.get(name) for name in names}
    originals = {name: module.infonce_forward for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.infonce_forward = lambda call, n=name: (seen.append(n), originals[n](call))
        infonce(ROWS, LABELS, ROWS.clone(), LABELS, temperature=0.1, **arguments)
    finally:
        for name, module in modules.items():
            module.infonce_forward = originals[name]
    return seen[0]


def test_precedence(monkeypatch):
    assert served_by() == "cpu"
    monkeypatch.setenv("PIXCONTRAST_BACKEND", "reference")
    assert served_by() == "reference"
    with use_backend("cpu"):
        assert served_by() == "cpu"
        assert served_by(backend="reference") == "reference"
        with use_backend("reference"):
            assert served_by() == "reference"
        assert served_by() == "cpu"
    monkeypatch.setenv("PIXCONTRAST_BACKEND", "")
    assert served_by() == "cpu"


def test_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(devices, "gpu", devices.Gpu())
    for name in ("cuda", "triton"):
        with pytest.raises(
            ValueError, match=f"backend '{name}' cannot serve infonce on cpu tensors of torch.float32"
        ):
            served_by(backend=name)
        monkeypatch.setenv("PIXCONTRAST_BACKEND", name)
        with pytest.raises(ValueError, match=f"backend '{name}' cannot serve"):
            served_by()
        monkeypatch.delenv("PIXCONTRAST_BACKEND")


def test_unknown_names(monkeypatch):
    with pytest.raises(
        ValueError, match="backend= names the backend 'fast', expected one of cuda, triton, cpu"
    ):
        served_by(backend="fast")
    with pytest.raises(ValueError, match=r"use_backend\(\) names the backend 'fast'"), use_backend("fast"):
        pass
    monkeypatch.setenv("PIXCONTRAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="PIXCONTRAST_BACKEND names the backend 'fast'"):
        served_by()


def test_available_backends_and_info_agree():
    found = available_backends()
    assert list(found) == ["cuda", "triton", "cpu", "reference"]
    assert found["cpu"] is None
    assert found["reference"] is None
    text = report()
    for name, reason in found.items():
        line = next(line for line in text.splitlines() if line.startswith(f"backend {name} "))
        assert line.endswith("ready" if reason is None else f"off: {reason}")
    assert torch.__version__ in text
    assert native._C.instruction_set() in text
    assert re.search(r"^CPU tensors go to +cpu$", text, re.M)


def test_info_tells_which_backend_serves_and_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a device")
    off = {"cuda": "it was compiled for sm_90", "triton": None}
    for name in off:
        monkeypatch.setattr(backends.get(name), "unsupported", lambda *_, name=name: off[name])
    assert re.search(
        r"^CUDA tensors go to +triton \(cuda is off: it was compiled for sm_90\)$", report(), re.M
    )
    off["cuda"] = None
    assert re.search(r"^CUDA tensors go to +cuda$", report(), re.M)
    off["cuda"], off["triton"] = "no kernels", "not installed"
    expected = r"^CUDA tensors go to +reference \(cuda is off: no kernels; triton is off: not installed\)$"
    assert re.search(expected, report(), re.M)


@pytest.fixture
def unbuilt(monkeypatch):
    monkeypatch.setattr(native, "unavailable", "it was never built")
    backends._warn_of_reference.cache_clear()
    yield
    backends._warn_of_reference.cache_clear()


def test_a_backend_that_is_off_cannot_be_entered(unbuilt):
    assert available_backends()["cpu"] == "it was never built"
    with pytest.raises(ValueError, match="backend 'cpu' is off: it was never built"), use_backend("cpu"):
        pass


def test_the_reference_serves_for_want_of_the_module_with_one_warning(unbuilt, recwarn):
    served_by(backend="reference")
    with use_backend("reference"):
        served_by()
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot serve .*: it was never built"):
        served_by(backend="cpu")
    assert backends.resolve(None, "infonce", torch.device("cpu"), torch.float64) == "reference"
    assert backends.resolve(None, "infonce", torch.device("meta"), torch.float32) == "reference"
    assert not recwarn.list  # it was named, or nothing but the reference serves the call

    assert served_by() == "reference"
    assert served_by() == "reference"
    (warning,) = recwarn.list
    assert "falls back to its reference backend" in str(warning.message)
    assert "it was never built" in str(warning.message)


@pytest.mark.parametrize("triton", [None, "not installed"])
def test_the_warning_is_for_cuda_tensors_as_well(unbuilt, triton, recwarn, monkeypatch):
    monkeypatch.setattr(devices, "gpu", devices.Gpu())
    monkeypatch.setattr(backends.get("triton"), "unsupported", lambda *_: triton)
    name = backends.resolve(None, "infonce", torch.device("cuda"), torch.float32, 64)
    assert (name, len(recwarn)) == (("triton", 0) if triton is None else ("reference", 1))


def test_the_warning_leaves_a_graph_whole(unbuilt, recwarn):
    compiled = torch.compile(
        lambda rows: infonce(rows, LABELS, rows, LABELS, temperature=0.1, exclude_self=True),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = infonce(ROWS, LABELS, ROWS, LABELS, temperature=0.1, exclude_self=True, backend="reference")
    torch.testing.assert_close(compiled(ROWS), expected)
    compiled(ROWS)
    assert [w.category for w in recwarn if "it was never built" in str(w.message)] == [RuntimeWarning]


def with_instruction_set(name: str, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PIXCONTRAST_CPU_ISA": name},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", native._C.instruction_sets())
def test_instruction_set_is_forced_by_the_environment(name):
    code = "from pixcontrast_ext.backends import native; print(native._C.instruction_set())"
    done = with_instruction_set(name, code)
    assert done.stdout.strip() == name, done.stderr


WRONG_INSTRUCTION_SET = """
import torch, pixcontrast_ext
from pixcontrast_ext.info import report
print(report())
rows, labels = torch.randn(6, 4), torch.arange(6) % 2
for dtype, backend in (("float64", None), ("float32", "reference"), ("float32", None), ("float32", "cpu")):
    rows = rows.to(getattr(torch, dtype))
    try:
        pixcontrast_ext.infonce(rows, labels, rows, labels, temperature=0.1, backend=backend)
        print("call served")
    except ValueError as error:
        print("call:", error)
"""


def test_a_wrong_instruction_set_stops_calls_and_not_the_import():
    done = with_instruction_set("quantum", WRONG_INSTRUCTION_SET)
    reason = (
        "PIXCONTRAST_CPU_ISA: instruction set 'quantum' is unknown or not supported by this processor; "
        f"supported: {', '.join(native._C.instruction_sets())}"
    )
    assert done.returncode == 0, done.stderr
    for line in ("native module +", "backend cpu +off: ", "CPU tensors go to +nowhere: "):
        assert re.search(f"^{line}{re.escape(reason)}$", done.stdout, re.M), done.stdout
    fp64, named, unnamed, cpu = done.stdout.splitlines()[-4:]
    assert (fp64, named) == ("call served", "call served")
    assert unnamed == f"call: {reason}"
    assert cpu == f"call: backend 'cpu' cannot serve infonce on cpu tensors of torch.float32: {reason}"


def test_kernels_refuse_missing_and_superfluous_fields():
    for fields, message in (({}, "widen: missing field: source"), ({"colour": 1}, "widen: missing field")):
        with pytest.raises(TypeError, match=message):
            native._C.widen(**fields)
    whole = dict(source=None, indices=None, num_rows=0, channels=0, rows=None, threads=1)
    native._C.widen(**whole)
    with pytest.raises(TypeError, match="widen: superfluous fields: colour"):
        native._C.widen(**whole, colour=1)
    with pytest.raises(TypeError, match="widen: num_rows may not be None"):
        native._C.widen(**whole | dict(num_rows=None))
    with pytest.raises(TypeError, match="widen: rows may not be 0"):
        native._C.widen(**whole | dict(rows=0))


def test_launch_refuses_what_a_pointer_cannot_say():
    with pytest.raises(
        ValueError, match=r"widen: source must be a contiguous tensor on cpu, got shape \(4, 6\)"
    ):
        native.launch("widen", source=torch.zeros(6, 4).T)


def test_launch_refuses_another_dtype():
    fields = dict(indices=None, num_rows=4, channels=4, threads=1)
    with pytest.raises(TypeError, match="plan_tiles: key_labels must be int32, got int64"):
        native.launch("plan_tiles", key_labels=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="widen: source must be float32, float16 or bfloat16, got float64"):
        native.launch(
            "widen", source=torch.zeros(4, 4, dtype=torch.float64), rows=torch.zeros(4, 4), **fields
        )
    with pytest.raises(
        TypeError, match="widen: rows must be float32, got float16"
    ):  # it would write fp32 there
        native.launch("widen", source=torch.zeros(4, 4), rows=torch.zeros(4, 4).half(), **fields)
    with pytest.raises(TypeError, match="sampling: labels must be int64, got int32"):
        native.launch("sampling", labels=torch.zeros(1, 3, 3, dtype=torch.int32))
    with pytest.raises(TypeError, match="plan_tiles: key_labels must be int32, got another dtype"):
        native.launch("plan_tiles", key_labels=torch.zeros(4, dtype=torch.int8))


def refusal(kernel: Callable[..., None], fields: dict[str, object]) -> str:
    """The kernel's error for these fields plus one that no struct has, so that the kernel never runs."""
    with pytest.raises(TypeError) as error:
        kernel(**fields, no_such_field=0)
    return str(error.value)


# One value for each kind of field; a field gets the first that its kernel accepts.
SCALAR, POINTER, MAP = 1, None, (0, 0, (1, 1, 1, 1), (1, 1, 1, 1))


def fields_of(kernel: Callable[..., None]) -> dict[str, object]:
    """The fields of a struct, found by asking its kernel which one is missing."""
    fields: dict[str, object] = {}
    while found := re.search(r"missing field: (\w+)", refusal(kernel, fields)):
        name = found[1]
        fitting = [
            value
            for value in (SCALAR, POINTER, MAP)
            if f": {name} may not be" not in refusal(kernel, fields | {name: value})
        ]
        fields[name] = fitting[0]
    return fields


def kernels() -> list[tuple[str, str]]:
    """(module, kernel) for every kernel that takes the fields of a struct."""
    on_cpu = "sampling gather gather_backward collect write plan_tiles collect_keys widen infonce_negatives "
    on_cpu += "infonce_positives infonce_finish infonce_score_gradients count_scores contrast_forward contrast_counts "
    on_cpu += "contrast_backward"
    on_gpu = "sampling gather gather_backward collect write infonce_forward infonce_backward"
    return [("cpu", name) for name in on_cpu.split()] + [
        ("cuda", name) for name in on_gpu.split() if "cuda" in GPU_BACKENDS and not ON_DEVICE
    ]


@pytest.mark.parametrize(("module", "name"), kernels())
def test_every_pointer_of_a_struct_has_one_dtype(module, name):
    """Rows and maps have three dtypes, every other pointer has one; any other dtype is refused by name."""
    kernel = getattr(native._C if module == "cpu" else devices.gpu.kernels, name)
    fields = fields_of(kernel)
    assert len(fields) > 5
    assert set(fields.values()) >= {SCALAR, POINTER}
    for field, value in fields.items():
        if value is SCALAR:
            continue
        taken = set()
        for dtype in (*native.DTYPE_CODES.values(), -1, len(native.DTYPE_CODES)):
            pointer = (64, dtype) if value is POINTER else (64, dtype, *MAP[2:])
            changed = {field: pointer}
            if field == "embeddings" and "grad_embeddings" in fields:  # its dtype is the map's
                changed["grad_embeddings"] = pointer
            said = refusal(kernel, fields | changed)
            refused = said.startswith(f"{name}: {field} must be ")
            assert refused or said.endswith("superfluous fields: no_such_field"), said
            taken |= set() if refused else {dtype}
        rows = {native.DTYPE_CODES[dtype] for dtype in native.DTYPES}
        assert taken == rows or (len(taken) == 1 and taken <= set(native.DTYPE_CODES.values())), (
            field,
            taken,
        )


@pytest.mark.parametrize(("module", "name"), kernels())
def test_rows_of_a_struct_are_of_one_dtype(module, name):
    """Otherwise a kernel would read or write past the end of the narrower ones."""
    kernel = getattr(native._C if module == "cpu" else devices.gpu.kernels, name)
    fields = fields_of(kernel)
    rows = [
        field
        for field, value in fields.items()
        if value is POINTER
        and not any("must be" in refusal(kernel, fields | {field: (64, dtype)}) for dtype in (0, 1, 2))
    ]
    for field, other in itertools.combinations(rows, 2):
        said = refusal(kernel, fields | {field: (64, 0), other: (64, 1)})
        assert "must be float32, got float16" in said, (field, other, said)


def test_dtypes_are_those_of_the_module():
    assert [str(dtype).removeprefix("torch.") for dtype in native.DTYPE_CODES] == native._C.DTYPES


def test_a_kernel_that_the_processor_lacks_is_an_error():
    if native.has_fused():
        pytest.skip("this processor has the fused kernels")
    kernel = native._C.contrast_forward
    with pytest.raises(RuntimeError, match="contrast_forward: not for this instruction set"):
        kernel(**fields_of(kernel))


def test_scratch_memory_outlives_the_kernel(monkeypatch):
    """A tensor that only the call owns must not be freed between taking its pointer and the kernel's end."""

    class Scratch(torch.Tensor):
        alive = 0

        def __new__(cls):
            cls.alive += 1
            return torch.Tensor._make_subclass(cls, torch.zeros(3))

        def __del__(self):
            Scratch.alive -= 1

    seen = []
    fake = type("Module", (), {"kernel": staticmethod(lambda **fields: seen.append(Scratch.alive))})
    monkeypatch.setattr(native, "_C", fake)
    native.launch("kernel", None, scratch=Scratch())
    assert seen == [1]


@pytest.fixture
def torch_before_2_9(monkeypatch):
    """A torch without precision settings per device and operation."""
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul", raising=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(allow_tf32=False))
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_stay_fp32_before_torch_2_9(torch_before_2_9, precision, monkeypatch):
    keys, seen, mm = ROWS.flip(0).requires_grad_(), [], torch.mm
    torch.set_float32_matmul_precision(precision)
    monkeypatch.setattr(
        torch, "mm", lambda *a, **k: (seen.append(torch.get_float32_matmul_precision()), mm(*a, **k))[1]
    )
    infonce(ROWS, LABELS, keys, LABELS, temperature=0.1, backend="cpu").backward()
    assert seen
    assert set(seen) == {"highest"}
    assert torch.get_float32_matmul_precision() == precision


def test_tf32_is_asked_for_by_its_old_name_before_torch_2_9(torch_before_2_9, monkeypatch):
    assert precision.full_float32(torch.float32)
    assert not precision.full_float32(torch.bfloat16)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert not precision.full_float32(torch.float32)


# Layering

# trainer -> loss, bank, head -> ops -> backends -> _C
LAYERS = ["_C", "backends", "ops", "model", "public", "trainer"]
SHARED = ("calls", "device", "errors", "native", "precision", "splits")  # used by the backends


def layer(path: str) -> str:
    head = path.split(".")[0] if path else ""
    if head in ("", "info"):
        return "public"
    model = (
        "bank",
        "batch",
        "criterion",
        "diagnostics",
        "head",
        "loss",
        "maps",
        "project",
        "settings",
        "tap",
    )
    return "model" if head in model else head


def imports_of(file: Path) -> set[str]:
    """Modules of the package that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            are_modules = [
                (PACKAGE.parent / Path(*s.split("."))).with_suffix(".py").exists() for s in submodules
            ]
            packages = [(PACKAGE.parent / Path(*s.split("."))).is_dir() for s in submodules]
            native_module = [s == "pixcontrast_ext._C" for s in submodules]
            kinds = zip(submodules, are_modules, packages, native_module, strict=True)
            names = [s if any(kind) else node.module for s, *kind in kinds]
        else:
            continue
        ours = [n for n in names if n.split(".")[0] == "pixcontrast_ext"]
        found |= {n.removeprefix("pixcontrast_ext").lstrip(".") for n in ours}
    return found


def modules() -> list[tuple[str, Path]]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 15
    return [
        (".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."), f)
        for f in files
    ]


@pytest.mark.parametrize(("module", "file"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_point_one_way(module, file):
    for imported in imports_of(file):
        own, other = LAYERS.index(layer(module)), LAYERS.index(layer(imported))
        allowed = other <= own
        if module == "info":
            allowed = layer(imported) != "trainer"
        assert allowed, f"{module or '__init__'} imports {imported}"
        if module.startswith("backends.") and imported.startswith("backends."):
            shared = imported.removeprefix("backends.") in SHARED
            within = module.split(".")[1] == imported.split(".")[1]
            assert shared or within, f"{module} imports {imported}: backends do not know each other"
        if imported == "_C":
            assert module == "backends.native", f"{module} imports the compiled module"


def test_the_reference_imports_torch_calls_and_errors_only():
    tree = ast.parse((PACKAGE / "backends" / "reference.py").read_text())
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names <= {"__future__", "math", "torch", "pixcontrast_ext"}
    assert imports_of(PACKAGE / "backends" / "reference.py") == {"backends.calls", "backends.errors"}


def test_import_is_quiet_and_lean():
    """Importing prints nothing and loads nothing heavy besides torch."""
    code = """
import sys, torch
before = set(sys.modules)  # torch imports triton where it is installed
import pixcontrast_ext
print([name for name in ('torch._dynamo', 'triton', 'kornia', 'matplotlib') if name in set(sys.modules) - before])
"""
    # torch warns where NumPy is not installed.
    quiet = ["-W", "error", "-W", "ignore:Failed to initialize NumPy"]
    done = subprocess.run([sys.executable, *quiet, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_no_block_walks_further_than_sums_that_are_cut_off_allow():
    """Schedules for an H100, from a few anchors to more row tiles than can run at once."""
    for columns_of_tile in (16, 32, 64, 128):
        for row_tiles in (1, 16, 256, 5000):
            for keys in (1, 19_000, 190_000, 300_000, 1_000_000, 20_000_000):
                column_tiles = -(-keys // columns_of_tile)
                shares = splits.choose(row_tiles, column_tiles, 264, columns_of_tile)
                assert -(-column_tiles // shares) * columns_of_tile < 2**16
                assert 1 <= shares <= column_tiles
                assert shares <= 1024
    assert splits.choose(16, 5938, 264, 32) == 16  # the paper's size fills the device as before


@pytest.mark.parametrize("fixture", ["backend", "quick_backend"])
def test_a_share_of_the_combinations_has_some_of_every_test_and_backend(fixture):
    def item(name, backend, number):
        params = {fixture: backend, "number": number}
        return types.SimpleNamespace(
            nodeid=f"{name}[{backend}-{number}]", callspec=types.SimpleNamespace(params=params)
        )

    sizes = {("a", "cpu"): 1, ("a", "cuda"): 9, ("b", "cpu"): 40}
    items = [item(*key, number) for key, size in sizes.items() for number in range(size)]
    left_out = list(outside_of_the_share(items, share=4))
    assert left_out == list(outside_of_the_share(items, share=4))  # the same every time
    kept = collections.Counter(each.nodeid.rpartition("-")[0] for each in items if each not in left_out)
    assert kept == {"a[cpu": 1, "a[cuda": 3, "b[cpu": 10}
    assert list(outside_of_the_share(items, share=1)) == []


def test_a_driver_that_is_too_old_is_named_with_what_to_do(monkeypatch):
    problem = "cudaErrorInsufficientDriver, CUDA driver version is insufficient for CUDA runtime version"
    kernels = types.SimpleNamespace(runtime_problem=lambda: problem)
    monkeypatch.setattr(devices, "gpu", types.SimpleNamespace(kernels=kernels))
    for compiler, message in {
        "g++ 12, nvcc 13.0": "nvcc 13.0) needs driver 580 or later: update it, or build with CUDA 12, which needs 525",
        "g++ 12, nvcc 12.8": "nvcc 12.8) needs driver 525 or later: update it",
    }.items():
        monkeypatch.setattr(native, "_C", types.SimpleNamespace(compiler=compiler))
        assert cuda._unsupported_device.__wrapped__(0) == f"the module's CUDA runtime ({message}"
    kernels.runtime_problem = lambda: "cudaErrorNoDevice, none"
    assert "does not start: cudaErrorNoDevice" in cuda._unsupported_device.__wrapped__(0)
