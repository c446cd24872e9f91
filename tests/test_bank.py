"""The bank as a module: construction, views, moves, copies, checkpoints. `test_enqueue.py` tests what it stores."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pixcontrast_ext import MemoryBank, PixelContrastLoss

BUFFERS = ("keys", "key_labels", "region_ptr", "region_fill", "pixel_ptr", "pixel_fill")


def make(**kwargs):
    return MemoryBank(3, 5, **(dict(region_slots=4, pixel_slots=6, pixels_per_image=2) | kwargs))


def feed(bank, steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        embeddings = torch.randn(2, bank.embed_dim, 4, 5, generator=generator)
        labels = torch.randint(0, bank.num_classes, (2, 4, 5), generator=generator)
        priority = torch.randint(0, 99, labels.shape, dtype=torch.int32, generator=generator)
        bank.enqueue(embeddings, labels, priority=priority)
    return bank


def state(bank):
    return {name: value.clone() for name, value in bank.state_dict().items()}


def same(bank, expected):
    found = bank.state_dict()
    return list(found) == list(expected) and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


# Construction


def test_a_new_bank_is_empty():
    bank = MemoryBank(19, 8)
    keys, labels = bank.flat()
    assert keys.shape == (190_000, 8)
    assert keys.dtype == torch.float32
    assert (keys == 0).all()
    assert labels.shape == (190_000,)
    assert labels.dtype == torch.int32
    assert (labels == -1).all()
    assert list(bank.state_dict()) == list(BUFFERS)
    assert not list(bank.parameters())
    assert all((bank.state_dict()[name] == 0).all() for name in BUFFERS[2:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (dict(embed_dim=0), ValueError, "embed_dim must be at least 1, got 0"),
        (dict(num_classes=2.0), TypeError, "num_classes must be an int, got 2.0"),
        (dict(num_classes=True), TypeError, "num_classes must be an int, got True"),
        (dict(region_slots=-1), ValueError, "region_slots must be at least 0, got -1"),
        (dict(pixel_slots=-1), ValueError, "pixel_slots must be at least 0, got -1"),
        (dict(pixels_per_image=-1), ValueError, "pixels_per_image must be at least 0, got -1"),
        (dict(pixels_per_image="10"), TypeError, "pixels_per_image must be an int, got '10'"),
        (dict(dtype=torch.int32), TypeError, "dtype must be a floating-point dtype, got torch.int32"),
        (dict(dtype=torch.float8_e4m3fn), TypeError, "dtype must be .*, got torch.float8_e4m3fn"),
        (dict(dtype="complex64"), TypeError, r"dtype must be a floating-point dtype, got torch\.complex64"),
        (
            dict(process_group="gloo"),
            ValueError,
            "process_group must be 'default', a group or None, got 'gloo'",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        MemoryBank(**(dict(num_classes=3, embed_dim=5) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_classes=4), "the bank has 3 classes, the loss 4"),
        (dict(num_classes=3, ignore_index=0), "the bank ignores label 255, the loss 0"),
        (dict(num_classes=3, normalize=False), "the bank has normalize=True, the loss normalize=False"),
    ],
)
def test_a_loss_refuses_the_bank_of_another_problem(change, message):
    with pytest.raises(ValueError, match=message):
        PixelContrastLoss(**change, bank=make())


@pytest.mark.parametrize("settings", [dict(pixel_slots=0), dict(pixel_slots=4, pixels_per_image=0)])
def test_a_loss_refuses_a_bank_that_never_holds_a_key(settings):
    with pytest.raises(ValueError, match="the bank would stay empty: region_slots is 0, and pixel_slots="):
        PixelContrastLoss(3, bank=dict(embed_dim=5, region_slots=0, **settings))


# Views, moves, copies


@pytest.mark.parametrize(("regions", "pixels"), [(4, 6), (0, 6), (4, 0), (0, 0)])
def test_flat_is_a_view_in_the_order_of_the_classes(regions, pixels):
    bank = feed(make(region_slots=regions, pixel_slots=pixels))
    keys, labels = bank.flat()
    slots = regions + pixels
    assert keys.shape == (3 * slots, 5)
    assert labels.shape == (3 * slots,)
    assert keys.untyped_storage().data_ptr() == bank.keys.untyped_storage().data_ptr()
    assert labels.untyped_storage().data_ptr() == bank.key_labels.untyped_storage().data_ptr()
    assert torch.equal(keys, bank.keys.reshape(-1, 5))
    assert labels.unique().tolist() == [0, 1, 2][: 3 * slots]
    before = keys.clone()
    feed(bank, seed=1)
    assert slots == 0 or not torch.equal(keys, before)


def test_reset_forgets_everything():
    bank, new = feed(make()), make()
    assert not same(bank, state(new))
    bank.reset()
    assert same(bank, state(new))
    assert same(feed(bank), state(feed(new)))


@pytest.mark.parametrize(
    "move", [lambda b: b.half(), lambda b: b.to(torch.bfloat16), lambda b: b.to("cpu", torch.float16)]
)
def test_a_move_to_another_dtype_takes_the_keys_along(backend, move):
    bank = feed(make())
    before = state(bank)
    move(bank)
    assert bank.keys.dtype in (torch.float16, torch.bfloat16)
    assert torch.equal(bank.keys, before["keys"].to(bank.keys.dtype))
    assert all(torch.equal(getattr(bank, name), before[name]) for name in BUFFERS[1:])
    assert all(getattr(bank, name).dtype == before[name].dtype for name in BUFFERS[1:])
    bank.enqueue(torch.randn(2, 5, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64), backend=backend)
    assert bank.region_ptr[0] == (before["region_ptr"][0] + 2) % 4


def test_a_move_to_another_device_takes_everything_along():
    bank = make().to("meta")
    assert {getattr(bank, name).device.type for name in BUFFERS} == {"meta"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_copies_go_their_own_way(copied):
    bank = feed(make(ignore_index=7))
    before = state(bank)
    twin = copied(bank)
    assert same(twin, before)
    assert twin.ignore_index == 7
    assert twin.extra_repr() == bank.extra_repr()
    feed(twin, seed=1)
    assert same(bank, before)
    assert not same(twin, before)
    assert same(feed(bank, seed=1), state(twin))


def test_a_copy_belongs_to_the_same_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        bank = feed(make(process_group=dist.new_group([0])))
        twin = copy.deepcopy(bank)
        assert twin.process_group is bank.process_group
        assert same(feed(twin, seed=1), state(feed(bank, seed=1)))
    finally:
        dist.destroy_process_group()


def test_a_bank_is_saved_and_restored_with_the_loss():
    loss = PixelContrastLoss(3, bank=feed(make()), min_pixels=1)
    other = PixelContrastLoss(3, bank=make(), min_pixels=1)
    other.load_state_dict(loss.state_dict())
    assert same(other.bank, state(loss.bank))
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False).bank, state(loss.bank))


@pytest.mark.parametrize("use", [lambda bank: bank.flat(), feed])
def test_keys_that_require_grad_are_rejected(use):
    bank = make()
    bank.keys.requires_grad_()
    with pytest.raises(ValueError, match="the bank's keys must not require grad"):
        use(bank)
    assert (bank.key_labels == -1).all()


# Checkpoints


def test_a_checkpoint_continues_where_it_was_written():
    bank, other = feed(make()), make()
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert same(other, state(bank))
    assert same(feed(other, seed=1), state(feed(bank, seed=1)))


def test_a_full_ring_and_empty_rings_are_no_damage():
    for settings in (dict(region_slots=0), dict(pixel_slots=0), dict(region_slots=0, pixel_slots=0), dict()):
        bank = feed(make(**settings), steps=8)
        make(**settings).load_state_dict(bank.state_dict())
    assert bank.region_fill.tolist() == [4, 4, 4]


def test_a_checkpoint_of_another_dtype_is_converted():
    bank, other = feed(make()), make(dtype="bfloat16")
    other.load_state_dict(bank.state_dict())
    assert other.keys.dtype == torch.bfloat16
    assert torch.equal(other.keys, bank.keys.bfloat16())
    assert torch.equal(other.key_labels, bank.key_labels)


def put(value, *place):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


DAMAGE = [
    (
        "keys",
        lambda t: t[:2],
        r"keys: the checkpoint has shape \(2, 10, 5\), this bank \(3, 10, 5\) \(num_classes=3, ",
    ),
    ("keys", lambda t: t[:, :9], r"shape \(3, 9, 5\), this bank \(3, 10, 5\).*region_slots=4, pixel_slots=6"),
    ("keys", lambda t: t[:, :, :4], r"shape \(3, 10, 4\), this bank \(3, 10, 5\).*embed_dim=5"),
    ("keys", lambda t: t.flatten(), r"keys: the checkpoint has shape \(150,\)"),
    ("key_labels", lambda t: t[:2], r"key_labels: the checkpoint has shape \(2, 10\), this bank \(3, 10\)"),
    ("region_ptr", lambda t: t[0], r"region_ptr: the checkpoint has shape \(\), this bank \(3,\)"),
    ("region_ptr", put(4, 1), r"region_ptr: expected 0 <= ptr < 4, got \[\d, 4, \d\]"),
    ("region_ptr", put(-1, 0), r"region_ptr: expected 0 <= ptr < 4, got \[-1, "),
    ("pixel_ptr", put(6, 2), r"pixel_ptr: expected 0 <= ptr < 6, got \[\d, \d, 6\]"),
    ("region_fill", put(5, 0), r"region_fill: expected 0 <= fill <= 4, got \[5, "),
    ("region_fill", put(-1, 0), r"region_fill: expected 0 <= fill <= 4, got \[-1, "),
    ("pixel_fill", put(7, 1), r"pixel_fill: expected 0 <= fill <= 6, got \[\d, 7, "),
    ("keys", put(math.nan, 2, 1, 3), r"keys: 1 values are not finite, the first at \[2, 1, 3\]"),
    ("keys", put(0.0, 1, 9), r"keys: 1 with a label are 0, which no bank holds, the first at \[1, 9\]"),
    ("keys", put(-math.inf, 0, 9), r"keys: 5 values are not finite, the first at \[0, 9, 0\]"),
    ("key_labels", put(2, 1, 3), r"key_labels: \[1, 3\] is 2, expected 1 or -1 \(1 such\)"),
    ("key_labels", put(-2, 0), r"key_labels: \[0, 0\] is -2, expected 0 or -1 \(10 such\)"),
    ("key_labels", put(300, 2, 0), r"key_labels: \[2, 0\] is 300, expected 2 or -1"),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_refused_whole(name, damage, message, strict):
    checkpoint, bank = state(feed(make(), seed=1)), feed(make())
    checkpoint[name] = damage(checkpoint[name])
    before = state(bank)
    with pytest.raises(RuntimeError, match=message):
        bank.load_state_dict(checkpoint, strict=strict)
    assert same(bank, before)


def test_damage_is_named_with_its_place_in_the_model():
    model = nn.ModuleDict({"loss": PixelContrastLoss(3, bank=make())})
    checkpoint = model.state_dict()
    checkpoint["loss.bank.region_ptr"] = torch.tensor([0, 9, 0])
    with pytest.raises(RuntimeError, match=r"loss\.bank\.region_ptr: expected 0 <= ptr < 4, got \[0, 9, 0\]"):
        model.load_state_dict(checkpoint)


@pytest.mark.parametrize("name", BUFFERS)
def test_a_checkpoint_that_lacks_a_part_is_refused_whole(name):
    checkpoint, bank = state(feed(make(), seed=1)), feed(make())
    del checkpoint[name]
    before = state(bank)
    with pytest.raises(RuntimeError, match=name):
        bank.load_state_dict(checkpoint)
    assert same(bank, before)


def test_a_checkpoint_that_overflows_the_dtype_of_the_keys_is_refused():
    bank, other = make(normalize=False), make(normalize=False, dtype=torch.float16)
    bank.enqueue(torch.full((1, 5, 1, 1), 1e5), torch.zeros(1, 1, 1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="keys: 10 values are not finite"):
        other.load_state_dict(bank.state_dict())
    assert other.keys.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("assign", [False, True])
def test_pointers_of_another_dtype_are_refused(dtype, assign):
    bank = MemoryBank(3, 5, region_slots=4, pixel_slots=4)
    state = bank.state_dict()
    state["region_ptr"] = state["region_ptr"].to(dtype)
    with pytest.raises(RuntimeError, match=f"region_ptr: the checkpoint has {dtype}, this bank torch.int64"):
        bank.load_state_dict(state, assign=assign)


def test_a_pointer_outside_its_ring_is_never_used():
    bank = MemoryBank(3, 5, region_slots=4, pixel_slots=4)
    bank.pixel_ptr[1] = -7
    with pytest.raises(ValueError, match="a ring pointer of class 1 is -7, outside of its ring"):
        bank.enqueue(torch.randn(2, 5, 4, 4), torch.ones(2, 4, 4, dtype=torch.int64), backend="cpu")
    assert (bank.key_labels == -1).all()


# Rows without a map


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_go_into_the_pixel_rings_in_their_order(backend, dtype):
    bank, rings = make(dtype=dtype), [[], [], []]
    for _ in range(3):
        rows, labels = torch.randn(9, 10)[:, ::2], torch.randint(0, 4, (9,))
        labels[labels == 3] = 255
        rows[1], rows[2] = 0.0, math.nan  # neither is stored
        bank.enqueue_rows(rows, labels.to(torch.uint8), backend=backend)
        for row, label in zip(rows, labels.tolist(), strict=True):
            if label != 255 and row.norm() > 0:
                rings[label].append(row / row.norm())
    assert (bank.region_fill == 0).all()
    assert (bank.key_labels[:, :4] == -1).all()
    for c, ring in enumerate(rings):
        assert bank.pixel_fill[c] == min(len(ring), 6)
        assert bank.pixel_ptr[c] == len(ring) % 6
        for place, row in list(enumerate(ring))[-6:]:
            torch.testing.assert_close(bank.keys[c, 4 + place % 6].float(), row, rtol=0, atol=1e-3)


def test_no_rows(backend):
    bank = make()
    bank.enqueue_rows(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), backend=backend)
    assert (bank.pixel_fill == 0).all()


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (torch.zeros(2, 5, 1), torch.zeros(2).long(), r"rows must have shape \[N, 5\], got \(2, 5, 1\)"),
        (torch.zeros(2, 6), torch.zeros(2).long(), r"rows must have shape \[N, 5\], got \(2, 6\)"),
        (torch.zeros(2, 5), torch.zeros(3).long(), r"labels must have shape \(2,\), got \(3,\)"),
        (torch.zeros(2, 5), torch.full((2,), 3), r"is 3, expected 0 <= label < num_classes=3"),
    ],
)
def test_bad_rows(rows, labels, message):
    with pytest.raises(ValueError, match=message):
        make().enqueue_rows(rows, labels)


def test_a_generator_for_the_draw_of_pixels(backend):
    states = []
    for seed in (1, 1, 2):
        bank, before = make(), torch.get_rng_state()
        embeddings = torch.linspace(-1, 1, 200).cos().view(2, 5, 4, 5)
        labels = torch.zeros(2, 4, 5, dtype=torch.int64)
        bank.enqueue(embeddings, labels, generator=torch.Generator().manual_seed(seed), backend=backend)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(bank.keys)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
