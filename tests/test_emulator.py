"""The emulator of CUDA kernels, and the kernels that it runs.

Its primitives must behave as the PTX manual says. It and the sanitizers must find the faults they exist to find, and
none in the kernels that ship.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pixcontrast_ext.backends import device as devices
from tests.support.backends import BACKENDS, ON_DEVICE
from tools import gpu_small
from tools.emulator import build, mutants, record, replay, sanitize
from tools.emulator.primitives import Primitives

SCHEDULES = replay.SCHEDULES
SANITIZED_SCHEDULES = os.environ.get("PIXCONTRAST_TEST_SCHEDULES", "").split() or SCHEDULES
NVCC = shutil.which("nvcc")


class Emulator:
    """Runs primitives on numpy arrays, which it changes."""

    def __init__(self, library: Path):
        self.primitives = Primitives(library)

    def run(self, name: str, *arrays: np.ndarray, numbers: tuple[int, ...] = ()) -> None:
        self.primitives.run(name, [array.ctypes.data for array in arrays], numbers)


class Device(Emulator):
    def run(self, name: str, *arrays: np.ndarray, numbers: tuple[int, ...] = ()) -> None:
        tensors = [torch.from_numpy(array.view(np.uint8)).cuda() for array in arrays]
        stream = torch.cuda.current_stream().cuda_stream
        self.primitives.run(name, [tensor.data_ptr() for tensor in tensors], numbers, stream)
        for array, tensor in zip(arrays, tensors, strict=True):
            array.view(np.uint8)[...] = tensor.cpu().numpy()


def compile_for_device(target: Path, *flags: str) -> Path:
    source = build.ROOT / "csrc/emulator/primitives.cu"
    command = [NVCC, "-std=c++20", "-O3", "-I", build.ROOT / "csrc", *flags, "-o", target, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def plain() -> Emulator:
    return Emulator(build.build("plain", targets=("primitives",)) / "primitives.so")


@pytest.fixture(scope="session", params=["emulator", "device"])
def machine(request: pytest.FixtureRequest) -> Emulator:
    """The properties tested on the emulator have to hold on a GPU too."""
    if request.param == "emulator":
        return request.getfixturevalue("plain")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    if NVCC is None:
        pytest.skip("there is no nvcc")
    folder = request.getfixturevalue("tmp_path_factory").mktemp("device")
    flags = ("-arch=native", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "--cudart=static")
    return Device(compile_for_device(folder / "primitives.so", *flags))


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PXC_EMULATOR_SCHEDULE", request.param)
    return request.param


def random(shape, low, high) -> np.ndarray:
    return np.random.default_rng(7).integers(low, high, shape)


def bits(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, np.float32).view(np.uint32)


# Semantics of the primitives: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "m16n8k8"

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4  # the manual's groupID, threadID_in_group


def fragments_of(matrix: np.ndarray, rows: list, columns: list) -> np.ndarray:
    """The elements that each lane holds, [32, elements of a lane]."""
    return np.stack([matrix[row, column] for row, column in zip(rows, columns, strict=True)], axis=1)


def sum_fragments(matrix: np.ndarray) -> np.ndarray:
    rows = [GROUP if i < 2 else GROUP + 8 for i in range(4)]
    return fragments_of(matrix, rows, [2 * MEMBER + (i & 1) for i in range(4)])


def half_fragments(a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """Words of two 16-bit elements each, of a [16, 16] and b [16, 8]."""
    rows = [GROUP if i in (0, 1, 4, 5) else GROUP + 8 for i in range(8)]
    a = fragments_of(a, rows, [2 * MEMBER + (i & 1) + (8 if i >= 4 else 0) for i in range(8)])
    b = fragments_of(b, [2 * MEMBER + (i & 1) + (8 if i >= 2 else 0) for i in range(4)], [GROUP] * 4)
    return [np.ascontiguousarray(x.astype(np.uint16)).view(np.uint32) for x in (a, b)]


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_mma(machine, kind):
    a, b = (random(shape, -32, 33).astype(np.float32) / 8 for shape in ((16, 16), (16, 8)))
    b = b[::-1].copy()  # drawn with the same seed
    c = random((16, 8), -99, 100).astype(np.float32)
    if kind == "half":
        words = half_fragments(a.astype(np.float16).view(np.uint16), b.astype(np.float16).view(np.uint16))
    else:
        words = half_fragments(bfloat16_bits(a), bfloat16_bits(b))
    sums = sum_fragments(c).copy()
    machine.run(f"mma_{kind}", *words, sums)
    assert np.array_equal(sums, sum_fragments(a @ b + c))


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_tensor_cores_are_cut_off(machine, monkeypatch, sign):
    """A device rounds as the emulator does when told to: towards zero, even with 3/4 of the last bit left over."""
    a, b = np.full((16, 16), sign * 1.5 * 2**-12, np.float32), np.full((16, 8), 2**-12, np.float32)
    a[:, 1:] = 0
    words = half_fragments(a.astype(np.float16).view(np.uint16), b.astype(np.float16).view(np.uint16))
    monkeypatch.setenv("PXC_EMULATOR_SUMS", "truncated")
    sums = np.full((32, 4), sign, np.float32)
    machine.run("mma_half", *words, sums)
    assert (sums == sign).all()
    if isinstance(machine, Device):
        return
    monkeypatch.setenv("PXC_EMULATOR_SUMS", "nearest")
    machine.run("mma_half", *words, sums)
    assert (sums == np.float32(sign * (1 + 2**-23))).all()
    monkeypatch.setenv("PXC_EMULATOR_SUMS", "up")
    with pytest.raises(RuntimeError, match='PXC_EMULATOR_SUMS is "nearest" or "truncated", not up'):
        machine.run("mma_half", *words, sums)


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix(machine, transposed):
    matrices = random((4, 8, 8), 0, 2**16).astype(np.uint16)
    found = np.zeros((32, 4), np.uint32)
    machine.run("ldmatrix", matrices, found, numbers=(transposed,))
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    words = np.ascontiguousarray(matrices).view(np.uint32)  # [4, 8, 4]
    assert np.array_equal(found, words[:, GROUP, MEMBER].T)


@pytest.mark.parametrize(("rows", "size"), [(75, 297), (32, 128), (1, 3), (64, 250), (33, 129)])
def test_cp_async(machine, rows, size):
    source = random((size,), 1, 2**31).astype(np.uint32)
    target = np.full(rows * 4, 0xABAB, np.uint32)
    machine.run("cp_async", source, target, numbers=(size, rows))
    assert np.array_equal(target, np.pad(source, (0, rows * 4 - size)))


def test_cp_async_of_nothing_reads_nothing(machine):
    target = np.full(128, 0xABAB, np.uint32)
    machine.run("zero_fill", target)
    assert (target == 0).all()


def test_exchange(machine):
    values = random((64,), -20, 21).astype(np.float32)
    found = np.zeros((64, 6), np.float32)
    machine.run("exchange", values, found)
    for warp, rows in zip(values.reshape(2, 32), found.reshape(2, 32, 6), strict=True):
        votes = [int(value > 0) << lane for lane, value in enumerate(warp)]
        assert np.array_equal(rows[:, 0], warp[(LANE * 5 + 3) % 32])
        assert np.array_equal(rows[:, 1], warp[LANE ^ 9])
        assert np.array_equal(rows[:, 2], np.concatenate([warp[:3], warp[:-3]]))
        assert np.array_equal(rows[:, 3], warp[::-1])
        assert (rows[:, 4] == sum(votes[:16])).all()
        assert np.array_equal(rows[:16, 5], warp[LANE[:16] ^ 1])
        assert (rows[16:, 5] == sum(votes[16:]) / 2**16 + warp[16]).all()


def test_named_barriers(machine):
    values = random((256,), 0, 1000).astype(np.int32)
    found, expected = np.zeros_like(values), values.reshape(4, 64).copy()
    machine.run("group", values, found, numbers=(5,))
    for group, part in enumerate(expected):
        for _ in range(5 + group):
            part[:] = part[::-1] + 1
    assert np.array_equal(found, expected.ravel())


def test_arithmetic(machine):
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        2.0**-149,
        65519.0,
        65520.0,
        2.0**-24,
        2.0**-25,
        3 * 2.0**-25,
    ]
    special += [
        1 + 2**-11,
        1 + 3 * 2**-11,
        1 + 2**-8,
        1 + 2**-7 + 2**-8,
        3.4028235e38,
        -126.0,
        -126.5,
        127.99,
        128.0,
    ]
    words = random((4000,), 0, 2**32).astype(np.uint32).view(np.float32)
    ordinary = (random((4000,), -(10**6), 10**6) / 1e4).astype(np.float32)
    values = np.concatenate([np.array(special, np.float32), words, ordinary])
    found = np.zeros((len(values), 9), np.uint32)
    machine.run("arithmetic", values, found, numbers=(len(values),))
    nan = np.isnan(values)

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        wide = values.astype(np.float64)
        exp2 = np.exp2(wide)
        halves = values.astype(np.float16).view(np.uint16)
        negative_halves = (-values).astype(np.float16).view(np.uint16)
    assert (found[np.isfinite(values), 0] == 0).all()  # two products of opposite sign cancel
    assert np.isnan(found[~np.isfinite(values), 0].view(np.float32)).all()

    approximate = found[:, 1].copy().view(np.float32)
    assert (approximate[exp2 < 2.0**-126] == 0).all()
    assert np.isnan(approximate[nan]).all()
    large = ~nan & (exp2 >= 2.0**-126)
    distance = approximate[large].view(np.int32) - bits(exp2[large]).view(np.int32)
    assert np.abs(distance).max() <= 2

    for column, expected, is_nan in (
        (2, halves, lambda x: x & 0x7FFF > 0x7C00),
        (3, bfloat16_bits(values), lambda x: x & 0x7FFF > 0x7F80),
    ):
        assert np.array_equal(found[~nan, column], expected[~nan])
        assert is_nan(found[nan, column]).all()
    packed = halves | negative_halves.astype(np.uint32) << 16
    assert np.array_equal(found[~nan, 4], packed[~nan])
    packed = bfloat16_bits(values) | bfloat16_bits(-values).astype(np.uint32) << 16
    assert np.array_equal(found[~nan, 5], packed[~nan])
    words = [int(word) for word in bits(values)]
    assert found[:, 6].tolist() == [word.bit_count() for word in words]
    assert found[:, 7].view(np.int32).tolist() == [(word & -word).bit_length() - 1 for word in words]
    assert np.array_equal(found[:, 8].view(np.float32), np.fmax(np.fmin(values, 1), -1))


def test_every_16_bit_number(machine):
    found = np.zeros((2**16, 2), np.uint32)
    machine.run("widen", found)
    words = np.arange(2**16, dtype=np.uint32)
    for column, expected in (
        (0, words.astype(np.uint16).view(np.float16)),
        (1, (words << 16).view(np.float32)),
    ):
        values, nan = expected.astype(np.float32), np.isnan(expected)
        assert np.array_equal(found[~nan, column], bits(values)[~nan])
        assert np.isnan(found[nan, column].copy().view(np.float32)).all()


def test_every_ticket_is_given_once(machine):
    found = np.zeros((2, 2, 3, 64), np.int32)
    machine.run("ticket", np.zeros(1, np.int32), found, numbers=(3, 2, 2, 64))
    assert sorted(found.ravel().tolist()) == list(range(768))


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.slow
def test_nvcc_compiles_the_primitives(tmp_path):
    assert compile_for_device(tmp_path / "primitives.o", "-arch=sm_80", "-c").stat().st_size > 0


# The emulator itself


@pytest.mark.skipif("cuda" not in BACKENDS, reason="PIXCONTRAST_TEST_BACKENDS leaves cuda out")
def test_every_kernel_runs_on_small_shapes():
    """The problems that `make gpu` gives to compute-sanitizer."""
    gpu_small.main("cuda", "cpu")


def tickets(emulator: Emulator, *shape: int) -> np.ndarray:
    found = np.zeros(shape[::-1], np.int32)  # threads, x, y, z -> [z, y, x, threads]
    threads, *grid = shape
    emulator.run("ticket", np.zeros(1, np.int32), found, numbers=(*grid, threads))
    return found


def test_schedules(plain, monkeypatch):
    shape = (64, 3, 2, 2)
    assert tickets(plain, *shape).ravel().tolist() == list(range(768))
    seen = {}
    for schedule in ("forward", "reverse", "1", "2"):
        monkeypatch.setenv("PXC_EMULATOR_SCHEDULE", schedule)
        seen[schedule] = tickets(plain, *shape)
        assert np.array_equal(tickets(plain, *shape), seen[schedule])
        assert sorted(seen[schedule].ravel()) == list(range(768))
        assert (np.ptp(seen[schedule], axis=-1) == 63).all()  # one block after another
    assert np.array_equal(seen["reverse"], 767 - seen["forward"])
    assert len({found.tobytes() for found in seen.values()}) == 4
    blocks = [seen[seed][..., 0].ravel() // 64 for seed in "12"]
    assert not np.array_equal(*blocks)
    for schedule in ("sideways", "3x"):
        monkeypatch.setenv("PXC_EMULATOR_SCHEDULE", schedule)
        with pytest.raises(RuntimeError, match=f"PXC_EMULATOR_SCHEDULE is .* or a number, not {schedule}"):
            tickets(plain, *shape)


def test_results_do_not_depend_on_the_schedule(plain, schedule):
    test_cp_async(plain, 75, 297)
    test_exchange(plain)
    test_named_barriers(plain)
    test_mma(plain, "half")
    test_ldmatrix(plain, 1)


def test_shared_memory_is_new_in_every_block(plain, schedule):
    found = np.zeros((3, 32), np.uint32)
    plain.run("stale", found)
    assert (found == 0xFFFFFFFF).all()


def test_threads_of_the_host_take_turns(plain):
    failures = []

    def work():
        try:
            for _ in range(20):
                test_named_barriers(plain)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.slow
def test_switching_by_the_system_works_too(tmp_path):
    """The variant that switches by ucontext, for processors other than x86-64."""
    library = tmp_path / "primitives.so"
    command = [*build.compiler(), *build.FLAGS, "-DPXC_EMULATOR_UCONTEXT=1", "-O1", "-shared", "-o", library]
    sources = ["csrc/emulator/emulator.cpp", "-x", "c++", "csrc/emulator/primitives.cu"]
    done = subprocess.run([*command, *sources], cwd=build.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    emulator = Emulator(library)
    for fault, _ in MISUSES:
        with pytest.raises(RuntimeError):
            emulator.run("misuse", np.zeros(64, np.int32), numbers=(fault,))
        test_named_barriers(emulator)


# (fault, message)
AT = r"at primitives\.cu:\d+"
MISUSES = [
    (0, rf"thread 32: sync_block {AT}, while thread 0 is in sync_block {AT}"),
    (1, rf"thread 6: sync_block {AT}, but thread 5 has exited"),
    (2, rf"deadlock: threads 0-62 in sync_block {AT}; thread 63 exited"),
    (3, rf"thread 32: sync_group\(1, 32\) {AT}, while thread 0 waits there for 64 threads"),
    (4, rf"sync_group\(1, 32\) {AT} is reached by a part of warp 0 only"),
    (5, rf"sync_group\(16, 64\) {AT}: an id is 1 to 15"),
    (6, rf"thread 16: sync_group {AT}, while lane 0 of its warp is in sync_group {AT}"),
    (7, rf"thread 1: shuffle {AT} with the mask ffffffff, while lane 0 is in shuffle {AT}"),
    (8, rf"thread 16: shuffle {AT} has the mask 0000ffff, without the caller, lane 16"),
    (9, rf"thread 0: shuffle {AT} reads lane 16, outside of the mask 0000ffff"),
    (10, rf"thread 4: ballot {AT} has the mask ffffffff, but lane 3 has exited"),
    (11, rf"shuffle_xor {AT} has the mask ffffffff, but lane 3 has exited"),
    (12, rf"deadlock: threads 0-7 in shuffle {AT}; threads 8-31 exited"),
    (13, rf"deadlock: threads 0-31 in sync_group\(1\) {AT}; threads 32-63 in sync_group\(2\) {AT}"),
    (14, rf"cp_async_16 {AT}: the shared address 0x\w+ is misaligned for 16 bytes"),
    (15, rf"cp_async_16 {AT}: the global address 0x\w+ is misaligned"),
    (16, rf"cp_async_4 {AT}: 0x\w+ is not in an array of shared memory"),
    (17, rf"cp_async_16 {AT} copies 0 or 16 bytes, not 8"),
    (18, r"the kernel ends with a cp.async in flight, of primitives\.cu:\d+"),
    (19, r"the kernel ends with a cp.async in flight, of primitives\.cu:\d+"),
    (20, rf"ldmatrix {AT}: the shared address 0x\w+ is misaligned for 16 bytes"),
    (21, rf"ldmatrix {AT}: 0x\w+ is not in an array of shared memory"),
    (22, rf"ldmatrix {AT}: 0x\w+ is not in an array of shared memory"),
    (23, rf"4 bytes of shared memory {AT} make 1040 in all, but the launch asked for 1024"),
    (24, rf"takes 4 bytes {AT} as its shared array 1, another thread 0 bytes {AT}"),
    (25, rf"thread 16: sync_warp {AT} with the mask ffffffff, while lane 0 is in mma<Half> {AT}"),
    (26, rf"deadlock: thread 0 in sync_warp {AT}; threads 1-63 in sync_block {AT}"),
    (27, "threw an exception: of a kernel"),
]


@pytest.mark.parametrize(("fault", "message"), MISUSES)
def test_misuse_is_an_error(plain, monkeypatch, fault, message):
    memory = np.zeros(64, np.int32)
    start = -memory.ctypes.data % 16 // 4
    for schedule in SCHEDULES:
        monkeypatch.setenv("PXC_EMULATOR_SCHEDULE", schedule)
        with pytest.raises(RuntimeError) as caught:
            plain.run("misuse", memory[start:], numbers=(fault,))
        text = str(caught.value)
        assert re.match(r"misuse: block \([01], [012], 0\), thread \d+: ", text)
        if schedule == "forward":
            assert "block (0, 0, 0)" in text, text
            assert re.search(message, text), text
        test_named_barriers(plain)  # the emulator still works


@pytest.mark.parametrize(
    ("grid", "threads", "shared", "message"),
    [
        ((1, 65536, 1), 32, 0, r"a grid of \(1, 65536, 1\) blocks is too large: y and z go to 65535"),
        ((1, 1, 65536), 32, 0, "too large"),
        ((2**31, 1, 1), 32, 0, "too large"),
        ((1, 1, 1), 33, 0, "1 to 32 whole warps, not 33 threads"),
        ((1, 1, 1), 0, 0, "not 0 threads"),
        ((1, 1, 1), 1056, 0, "not 1056 threads"),
        ((1, 1, 1), 32, 101377, "a block can have 101376 bytes of shared memory, not 101377"),
    ],
)
def test_refused_launches(plain, monkeypatch, grid, threads, shared, message):
    monkeypatch.setenv("PXC_EMULATOR_SHARED", "100")
    counter, found = np.zeros(1, np.int32), np.zeros(1, np.int32)
    with pytest.raises(RuntimeError, match=f"^launch: .*{message}"):
        plain.run("launch", counter, found, numbers=(*grid, threads, shared))
    assert counter[0] == 0


def test_a_device_has_the_shared_memory_that_is_asked_for(plain, monkeypatch):
    counter, found = np.zeros(1, np.int32), np.zeros(32, np.int32)
    plain.run("launch", counter, found, numbers=(1, 1, 1, 32, 227 * 1024))
    assert counter[0] == 32
    with pytest.raises(RuntimeError, match="a block can have 232448 bytes"):
        plain.run("launch", counter, found, numbers=(1, 1, 1, 32, 227 * 1024 + 1))
    for wrong in ("99", "229", "much"):
        monkeypatch.setenv("PXC_EMULATOR_SHARED", wrong)
        with pytest.raises(RuntimeError, match=f"PXC_EMULATOR_SHARED is 100 to 228, not {wrong}"):
            plain.run("launch", counter, found, numbers=(1, 1, 1, 32, 0))


def test_an_empty_grid_is_no_launch(plain):
    counter, found = np.zeros(1, np.int32), np.zeros(1, np.int32)
    plain.run("launch", counter, found, numbers=(0, 1, 1, 32, 0))
    assert counter[0] == 0


# Sanitizers


def sanitized(variant: str, target: str) -> Path:
    reason = sanitize.missing(variant)
    if reason is not None:
        pytest.skip(reason)
    return build.build(variant, targets=(target,))


RACES = {
    0: "a dropped barrier",
    1: "a write while others read",
    2: "a counter of all blocks",
    3: "a shuffle taken for a barrier",
    4: "a barrier of another group",
    5: "a copy that may land too early",
    6: "no barrier after the wait for a copy",
    8: "rows of other lanes",
}


@pytest.mark.slow
def test_thread_sanitizer_sees_races_and_nothing_else():
    library = sanitized("thread", "primitives") / "primitives.so"
    harmless = 99
    every = "exitcode=66:suppress_equal_stacks=0:suppress_equal_addresses=0"
    done = sanitize.run(
        "thread", "tools.emulator.primitives", library, harmless, *RACES, harmless, TSAN_OPTIONS=every
    )
    reports = re.split(r"^fault (\d+)$", done.stderr, flags=re.M)[1:]
    found = list(zip(map(int, reports[::2]), reports[1::2], strict=True))
    assert [fault for fault, _ in found] == [harmless, *RACES, harmless], done.stderr
    for fault, text in found:
        is_race = "WARNING: ThreadSanitizer: data race" in text and "primitives.cu" in text
        assert is_race == (fault != harmless), f"{RACES.get(fault)}: {text}"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (7, "heap-buffer-overflow"),  # from one shared array into the next
        (9, "heap-buffer-overflow"),  # past the end of global memory
        (10, "signed integer overflow"),
        (11, "heap-buffer-overflow"),  # by an asynchronous copy
        (99, None),
    ],
)
@pytest.mark.slow
def test_address_sanitizer_sees_what_is_out_of_bounds(fault, message):
    library = sanitized("address", "primitives") / "primitives.so"
    done = sanitize.run("address", "tools.emulator.primitives", library, fault)
    assert (done.returncode == 0) == (message is None)
    assert message is None or (message in done.stderr and "primitives.cu" in done.stderr), done.stderr


@pytest.fixture(scope="session")
def recording(tmp_path_factory) -> Path:
    if ON_DEVICE:
        pytest.skip("the kernels run on a device")
    if "cuda" not in BACKENDS:
        pytest.skip("PIXCONTRAST_TEST_BACKENDS leaves cuda out")
    path = tmp_path_factory.mktemp("recording") / "calls.npz"
    assert record.record(path, devices.gpu.kernels) > 200
    return path


@pytest.mark.parametrize("variant", build.VARIANTS)
@pytest.mark.slow
def test_kernels_pass_the_sanitizers_under_every_schedule(recording, variant):
    """No bit may depend on the schedule; a sanitizer sees bad accesses and races under any schedule."""
    folder = sanitized(variant, "_C")
    schedules = SCHEDULES if variant == "plain" else SANITIZED_SCHEDULES
    # ThreadSanitizer takes as long as all the rest: the usual run of the tests takes every fourth of those alike.
    every = 4 if variant == "thread" and len(schedules) < len(SCHEDULES) else 1
    done = sanitize.run(
        variant, "tools.emulator.replay", folder, recording, *schedules, "--every", str(every)
    )
    output = done.stdout + done.stderr[-6000:]
    assert done.returncode == 0, output
    assert "ThreadSanitizer" not in done.stderr, output


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_still_fit_the_kernels(mutant):
    """Each fault still applies to its kernel; `make mutants` runs them."""
    source = (build.ROOT / "csrc" / "cuda" / mutant.file).read_text()
    assert mutant.apply(source) != source
