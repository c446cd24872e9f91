"""What only a GPU can show: streams, graphs, synchronisation, repeatability, sizes, accuracy of tensor cores."""

from __future__ import annotations

import collections
import threading
import time

import pytest
import torch

from pixcontrast_ext import (
    MemoryBank,
    Mining,
    PixelContrastLoss,
    ProjectionHead,
    draw_keys,
    gather_embeddings,
    hard_anchor_sampling,
    infonce,
    score_thresholds,
)
from pixcontrast_ext.backends import cuda, reference, splits
from pixcontrast_ext.backends import device as devices
from pixcontrast_ext.backends.calls import InfonceForward
from pixcontrast_ext.backends.triton import numerics
from tests.support.backends import GPU_BACKENDS
from tests.support.checks import error
from tests.support.inputs import BANK, RANDOM, draw_rows

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = GPU_BACKENDS
GRADIENT_BAR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    """In this file tensors lie on the device, whatever stands in for it in other tests."""
    monkeypatch.setattr(devices, "gpu", devices.Gpu())


@pytest.fixture(params=BACKENDS)
def device_backend(request):
    if request.param == "triton" and numerics.INTERPRETED.value:
        pytest.skip("Triton interprets in this process; PIXCONTRAST_TEST_CUDA=device makes it compile")
    if request.param == "cuda" and devices.gpu.kernels is None:
        pytest.skip("the module was built without CUDA kernels")
    return request.param


def draw(a, k, d, classes, dtype=torch.float32, order=BANK):
    """Rows on the device, every one with a label."""
    return draw_rows(
        a, k, d, classes,
        order=order, dtype=dtype, label_dtype=torch.int32, unlabelled=None, device=DEVICE,
    )  # fmt: skip


def draw_maps(batch=4, channels=64, height=64, width=48, classes=7, dtype=torch.float32):
    """Embeddings, labels and predictions on the device, classes in blocks of 8 x 8 pixels."""
    embeddings = torch.randn(batch, channels, height, width, device=DEVICE, dtype=dtype)
    labels = torch.randint(0, classes + 1, (batch, height // 8, width // 8), device=DEVICE)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[labels == classes] = 255
    predictions = torch.where(torch.rand(labels.shape, device=DEVICE) < 0.3, (labels + 1) % classes, labels)
    return embeddings, labels, predictions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1024, 19000, 256, 19), (100, 9500, 256, 19), (700, 5001, 129, 7), (333, 4000, 512, 59)]
)
@pytest.mark.parametrize("order", [BANK, RANDOM])
def test_infonce_against_double_precision(device_backend, dtype, shape, order):
    inputs = draw(*shape, dtype=dtype, order=order)
    loss, lse, weight, count, grad = torch.ops.pixcontrast.infonce_forward(
        *inputs, 0.07, False, True, device_backend
    )
    scale = 1.0 / count.clamp(min=1)
    key_grad = torch.ops.pixcontrast.infonce_backward_keys(
        *inputs, lse, weight, scale, 0.07, False, device_backend
    )
    anchors, keys = (x.double().requires_grad_() for x in inputs[::2])
    expected, _ = reference.infonce_per_anchor(anchors, inputs[1], keys, inputs[3], 0.07, False)
    expected.sum().backward()
    assert error(loss, expected.detach()) <= 1e-6
    assert error(grad, anchors.grad) <= GRADIENT_BAR[dtype]
    assert error(key_grad, keys.grad) <= GRADIENT_BAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1024, 256, 19), (3001, 64, 5)])
def test_symmetric_infonce_against_double_precision(device_backend, dtype, shape):
    a, d, classes = shape
    anchors, labels, _, _ = draw(a, 1, d, classes, dtype=dtype, order=RANDOM)
    loss, lse, weight, count, _ = torch.ops.pixcontrast.infonce_forward(
        anchors, labels, anchors, labels, 0.1, True, False, device_backend
    )
    grad = torch.ops.pixcontrast.infonce_backward_symmetric(
        anchors, labels, lse, weight, 1.0 / count.clamp(min=1), 0.1, True, device_backend
    )
    exact = anchors.double().requires_grad_()
    expected, _ = reference.infonce_per_anchor(exact, labels, exact, labels, 0.1, True)
    expected.sum().backward()
    assert error(loss, expected.detach()) <= 1e-6
    assert error(grad, exact.grad) <= GRADIENT_BAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["random", "semi-hard", "hardest"])
@pytest.mark.parametrize("order", [BANK, RANDOM])
def test_mining_against_double_precision(device_backend, dtype, strategy, order):
    """All but the few anchors of which a cosine lies on a bin's edge, where both may be right."""
    anchors, labels, keys, key_labels = draw(700, 19000, 256, 19, dtype=dtype, order=order)
    mining = Mining(strategy, negatives=300, positives=30)
    drawn = draw_keys(keys, key_labels, mining)
    rows = anchors, labels, keys, drawn.positive_labels
    kept = score_thresholds(*rows, mining, negatives=drawn.negatives, backend=device_backend)
    every = drawn.negatives or (keys, key_labels)
    forward = torch.ops.pixcontrast.mining_forward(*rows, *every, *kept, 0.07, False, True, device_backend)
    loss, lse, weight, count, grad = forward
    scale = 1.0 / count.clamp(min=1)
    key_grad = torch.ops.pixcontrast.mining_backward_keys(
        *rows, lse, weight, scale, *kept, 0.07, False, device_backend
    )
    exact = [x.double() if x.is_floating_point() else x for x in (*rows, *every)]
    truth = torch.ops.pixcontrast.mining_forward(*exact, *kept, 0.07, False, True, "reference")
    true_key_grad = torch.ops.pixcontrast.mining_backward_keys(
        *exact[:4], truth[1], truth[2], 1.0 / truth[3].clamp(min=1).double(), *kept, 0.07, False, "reference"
    )
    off = (loss - truth[0]).abs() / truth[0].clamp(min=1e-3)
    assert off.quantile(0.98) <= 2e-6
    off = (grad - truth[4]).norm(dim=1) / truth[4].norm(dim=1).mean()
    assert off.quantile(0.98) <= 2 * GRADIENT_BAR[dtype]
    off = (key_grad - true_key_grad).norm(dim=1) / true_key_grad.norm(dim=1).mean()
    assert off.quantile(0.98) <= 2 * GRADIENT_BAR[dtype]
    if strategy == "hardest":  # the pairs of the histograms are those of the loss, to the last one
        counts = torch.ops.pixcontrast.mining_counts(*rows, *every, False, device_backend)[1].cumsum(1)
        edge = ((kept.pos_max + 1) * 256).clamp(max=512).nan_to_num(posinf=512).long() - 1
        assert torch.equal(counts.gather(1, edge[:, None])[:, 0], count.long())


def test_a_bin_counts_as_many_keys_as_there_are(device_backend):
    """More than 16 bits hold, in one bin, of which the kernels keep two in a word."""
    anchors, labels = torch.eye(4, 64, device=DEVICE), torch.zeros(4, dtype=torch.int32, device=DEVICE)
    keys = anchors[:1].repeat(300_001, 1)
    key_labels = (torch.arange(len(keys), device=DEVICE) % 4 == 0).int()
    counts = torch.ops.pixcontrast.mining_counts(
        anchors, labels, keys, key_labels, keys, key_labels, False, device_backend
    )
    for found, each in zip(counts, (75_001, 225_000), strict=True):
        expected = torch.zeros_like(found)
        expected[0, 511] = each
        expected[1:, 256] = each
        assert torch.equal(found, expected)


def test_tf32_is_rounded_to_nearest(device_backend):
    inputs = draw(1024, 19000, 256, 19)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        loss, _, _, _, grad = torch.ops.pixcontrast.infonce_forward(
            *inputs, 0.07, False, True, device_backend
        )
    finally:
        torch.set_float32_matmul_precision(before)
    anchors = inputs[0].double().requires_grad_()
    expected, _ = reference.infonce_per_anchor(anchors, inputs[1], inputs[2].double(), inputs[3], 0.07, False)
    expected.sum().backward()
    assert 1e-8 < error(grad, anchors.grad) <= 1e-3  # truncated operands would exceed it
    assert error(loss, expected.detach()) <= 1e-4


class Step:
    """One training step of the criterion on fixed memory: sampling, gather, loss, backward, enqueue."""

    def __init__(self, backend, dtype=torch.float32):
        self.embeddings, self.labels, self.predictions = draw_maps(dtype=dtype)
        self.embeddings.requires_grad_()
        self.priority = torch.randint(2**31 - 1, self.labels.shape, device=DEVICE, dtype=torch.int32)
        self.bank = MemoryBank(7, 64, region_slots=20, pixel_slots=100, dtype=dtype, process_group=None).to(
            DEVICE
        )
        self.backend = backend
        self.bank.enqueue(self.embeddings.detach(), self.labels, priority=self.priority, backend=backend)

    def __call__(self):
        sample = hard_anchor_sampling(
            self.labels, self.predictions, num_classes=7, max_samples=300, max_views=20, priority=self.priority,
            backend=self.backend,
        )  # fmt: skip
        anchors = gather_embeddings(self.embeddings, sample.indices, backend=self.backend)
        keys, key_labels = self.bank.flat()
        loss = infonce(anchors, sample.labels, keys, key_labels, temperature=0.1, backend=self.backend)
        (grad,) = torch.autograd.grad(loss, self.embeddings)
        self.bank.enqueue(self.embeddings.detach(), self.labels, priority=self.priority, backend=self.backend)
        return loss, grad, sample.indices, self.bank.keys.clone(), self.bank.key_labels.clone()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_repeat_gives_the_same_bits(device_backend, dtype):
    step = Step(device_backend, dtype)
    state = {name: value.clone() for name, value in step.bank.state_dict().items()}
    first = step()
    for _ in range(500):
        step.bank.load_state_dict(state)
        for found, expected in zip(step(), first, strict=True):
            assert torch.equal(found, expected)


def test_a_side_stream_is_respected(device_backend):
    step = Step(device_backend)
    state = {name: value.clone() for name, value in step.bank.state_dict().items()}
    expected = step()
    step.bank.load_state_dict(state)
    kept = step.embeddings.detach().clone()
    with torch.no_grad():
        step.embeddings.fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would read the NaN
        with torch.no_grad():
            step.embeddings.copy_(kept)
        found = step()
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_graph_captures_the_whole_step(device_backend):
    step = Step(device_backend)
    state = {name: value.clone() for name, value in step.bank.state_dict().items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    with torch.no_grad():  # new data in the same memory
        step.embeddings.copy_(torch.randn_like(step.embeddings))
        step.priority.copy_(torch.randint_like(step.priority, 2**31 - 1))
    step.bank.load_state_dict(state)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [output.clone() for output in outputs]
    step.bank.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("with_bank", [True, False])
@pytest.mark.parametrize("strategy", [None, "random", "semi-hard", "hardest"])
def test_a_step_never_waits_for_the_device(device_backend, with_bank, with_head, strategy):
    embeddings, labels, _ = draw_maps()
    logits = torch.randn(4, 7, *labels.shape[1:], device=DEVICE)
    bank = MemoryBank(7, 64, region_slots=20, pixel_slots=100, process_group=None) if with_bank else None
    mining = None if strategy is None else Mining(strategy, negatives=20, positives=10)
    head = ProjectionHead(64, 64) if with_head else None
    loss_function = PixelContrastLoss(
        7, max_samples=200, max_views=10, bank=bank, mining=mining, head=head, backend=device_backend
    ).to(DEVICE)
    embeddings.requires_grad_()
    loss_function(embeddings, labels, logits).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_function(embeddings, labels, logits).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert embeddings.grad.isfinite().all()


def test_the_whole_criterion_agrees_with_the_reference(device_backend):
    embeddings, labels, _ = draw_maps()
    logits = torch.randn(4, 7, *labels.shape[1:], device=DEVICE)
    losses, grads = [], []
    for backend in ("reference", device_backend):
        bank = MemoryBank(7, 64, region_slots=20, pixel_slots=100, process_group=None)
        function = PixelContrastLoss(7, max_samples=200, max_views=10, bank=bank, backend=backend).to(DEVICE)
        x = embeddings.clone().requires_grad_()
        torch.manual_seed(5)
        for _ in range(3):
            loss = function(x, labels, logits)
        loss.backward()
        losses.append(loss.detach()), grads.append(x.grad)
    assert losses[0] > 0
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-6, atol=0)
    assert error(grads[1], grads[0].double()) <= 1e-5


def test_bad_labels_and_indices_are_ignored(device_backend):
    embeddings, labels, predictions = draw_maps()
    priority = torch.randint(2**31 - 1, labels.shape, device=DEVICE, dtype=torch.int32)
    wild = torch.where(labels == 255, torch.randint(1000, 10**9, labels.shape, device=DEVICE), labels)
    settings = dict(num_classes=7, max_samples=300, max_views=20, priority=priority, backend=device_backend)
    for found, expected in zip(
        hard_anchor_sampling(wild, predictions, **settings),
        hard_anchor_sampling(labels, predictions, **settings),
        strict=True,
    ):
        assert torch.equal(found, expected)
    indices = torch.tensor([0, -1, 2**40, 5], device=DEVICE)
    rows = gather_embeddings(embeddings, indices, backend=device_backend)
    assert (rows[1:3] == 0).all()
    assert (rows[[0, 3]] != 0).any()


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(device_backend):
    if torch.cuda.get_device_properties(DEVICE).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of device memory")
    k, d = 2**31 // 256 + 70_001, 256
    keys = torch.zeros(k, d, device=DEVICE, dtype=torch.bfloat16)
    key_labels = torch.full((k,), -1, device=DEVICE, dtype=torch.int32)
    anchors, anchor_labels, last, last_labels = draw(100, 3000, d, 5, dtype=torch.bfloat16)
    keys[-3000:], key_labels[-3000:] = last, last_labels
    found = torch.ops.pixcontrast.infonce_forward(
        anchors, anchor_labels, keys, key_labels, 0.1, False, True, device_backend
    )
    expected = torch.ops.pixcontrast.infonce_forward(
        anchors, anchor_labels, last, last_labels, 0.1, False, True, device_backend
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
    del keys
    height, width = 2**12, 2**31 // 2**12 // 8 + 3
    embeddings = torch.zeros(1, 8, height, width, device=DEVICE, dtype=torch.bfloat16)
    embeddings[0, :, -1] = 1.0
    labels = torch.full((1, height, width), 255, device=DEVICE)
    labels[0, -1, -1] = 1
    bank = MemoryBank(2, 8, region_slots=2, pixel_slots=2, process_group=None).to(DEVICE)
    bank.enqueue(embeddings, labels, backend=device_backend)
    assert bank.region_fill.tolist() == [0, 1]
    torch.testing.assert_close(bank.keys[1, 0], torch.full((8,), 8**-0.5, device=DEVICE))
    sample = hard_anchor_sampling(
        labels, labels, num_classes=2, max_samples=4, max_views=1, min_pixels=1, backend=device_backend
    )
    assert sample.indices[0].item() == height * width - 1


def test_other_threads_run_while_a_call_waits(device_backend):
    """The GIL is released during a launch, even one that finds the queue of a sleeping device full.

    So most of another thread's turns fall into that one call.
    """
    inputs = draw(64, 500, 64, 3)
    torch.ops.pixcontrast.infonce_forward(*inputs, 0.1, False, False, device_backend)

    def turns_by_call(cycles):
        """How many turns this thread gets during each of the calls that another thread makes."""
        turns, begun, done = collections.Counter(), 0, threading.Event()

        def launch_many():
            nonlocal begun
            for begun in range(600):  # noqa: B007  more launches than the 1,024 that the queue takes
                torch.ops.pixcontrast.infonce_forward(*inputs, 0.1, False, False, device_backend)
            done.set()

        thread = threading.Thread(target=launch_many)
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        thread.start()
        while not done.is_set():
            time.sleep(1e-4)
            turns[begun] += 1
        thread.join()
        torch.cuda.synchronize()
        return turns

    for cycles in (2 * 10**9, 16 * 10**9, 128 * 10**9):  # a busy host takes longer to fill the queue
        turns = turns_by_call(cycles)
        if max(turns.values()) > 0.5 * sum(turns.values()):
            return
    pytest.fail("the other thread has its turn between calls, not in one")


def test_tensors_of_another_device(device_backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = draw(64, 500, 64, 3)
    expected = torch.ops.pixcontrast.infonce_forward(*inputs, 0.1, False, True, device_backend)
    other = torch.device("cuda", 1)
    found = torch.ops.pixcontrast.infonce_forward(
        *(x.to(other) for x in inputs), 0.1, False, True, device_backend
    )
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        assert a.device == other
        torch.testing.assert_close(a.to(DEVICE), b, rtol=1e-6, atol=1e-7)


def test_a_refused_launch_raises(monkeypatch):
    if devices.gpu.kernels is None:
        pytest.skip("the module was built without CUDA kernels")
    inputs = draw(64, 100, 64, 3)
    outputs = [torch.empty(64, device=DEVICE) for _ in range(3)]
    count = torch.empty(64, device=DEVICE, dtype=torch.int32)
    call = InfonceForward(*inputs, 0.1, False, False, *outputs, count, None)
    monkeypatch.setattr(splits, "choose", lambda *_: 70_000)  # more than a grid may have
    with pytest.raises(RuntimeError, match=r"infonce_.*invalid"):
        cuda.infonce_forward(call)
    monkeypatch.undo()
    monkeypatch.setattr(devices, "gpu", devices.Gpu())
    assert infonce(*inputs, temperature=0.1).isfinite()


def test_fullgraph_compile(device_backend):
    embeddings, labels, predictions = draw_maps()
    priority = torch.randint(2**31 - 1, labels.shape, device=DEVICE, dtype=torch.int32)
    _, _, keys, key_labels = draw(1, 500, 64, 7)

    def step(embeddings):
        sample = hard_anchor_sampling(
            labels,
            predictions,
            num_classes=7,
            max_samples=300,
            max_views=20,
            priority=priority,
            backend=device_backend,
        )
        anchors = gather_embeddings(embeddings, sample.indices, backend=device_backend)
        return infonce(anchors, sample.labels, keys, key_labels, temperature=0.1, backend=device_backend)

    torch.testing.assert_close(
        torch.compile(step, fullgraph=True)(embeddings), step(embeddings), rtol=1e-6, atol=0
    )
