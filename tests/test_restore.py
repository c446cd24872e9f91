"""State restored in other ways than a plain `load_state_dict`: what happens must follow what the buffers say."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pixcontrast_ext import MemoryBank, PixelContrastCrossEntropyLoss, PixelContrastLoss, ProjectionHead

WARMUP = 3


def make(**settings):
    bank = MemoryBank(4, 6, region_slots=5, pixel_slots=9, pixels_per_image=2)
    return PixelContrastCrossEntropyLoss(4, warmup_steps=WARMUP, min_pixels=1, bank=bank, **settings)


def step(criterion, seed=0):
    """Whether the contrast took part."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(2, 6, 5, 7, generator=generator).requires_grad_()
    labels = torch.randint(0, 4, (2, 5, 7), generator=generator)
    logits = torch.randn(2, 4, 5, 7, generator=generator)
    loss, parts = criterion(logits, embeddings, labels, return_parts=True)
    loss.backward()
    assert (parts["contrast"] > 0) == embeddings.grad.any()
    return bool(parts["contrast"] > 0)


def trained(steps):
    criterion = make()
    for seed in range(steps):
        step(criterion, seed)
    return criterion


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def on_meta():
    with torch.device("meta"):
        return make()


def is_new(criterion):
    bank = criterion.bank
    return criterion.step == 0 and all(
        (value == (-1 if name == "key_labels" else 0)).all() for name, value in bank.named_buffers()
    )


def goes_on_like(criterion, other):
    """Assert that buffers and behaviour agree, now and over the next steps."""
    for seed in range(10, 14):
        assert all(torch.equal(a, b) for a, b in zip(criterion.buffers(), other.buffers(), strict=True))
        torch.manual_seed(seed)
        found = step(criterion, seed)
        torch.manual_seed(seed)
        assert found == step(other, seed)
    return True


@pytest.mark.parametrize("steps", [1, WARMUP, 5])
@pytest.mark.parametrize("way", ["copied", "assigned", "assigned to meta", "emptied first", "in place"])
def test_a_restored_criterion_goes_on(steps, way, tmp_path, poison):
    """`in place` is torch.distributed.checkpoint, which writes into the buffers without calling our code."""
    saved = trained(steps)
    criterion = on_meta() if "meta" in way or "emptied" in way else make()
    if way == "in place":
        dcp.save(saved.state_dict(), checkpoint_id=tmp_path, no_dist=True)
        dcp.load(criterion.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    else:
        if way == "emptied first":
            criterion.to_empty(device="cpu")
        criterion.load_state_dict(state(saved), assign="assigned" in way)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert goes_on_like(criterion, saved)


def test_memory_for_a_criterion_from_meta_is_filled(poison):
    criterion = on_meta().to_empty(device="cpu")
    assert is_new(criterion)
    assert not step(criterion)


@pytest.mark.parametrize("garbage", [0, 94850857649568, -1])
@pytest.mark.parametrize("notices", ["train", "eval", "call"])
def test_buffers_that_a_loader_left_uninitialised_are_noticed(garbage, notices):
    """As transformers' `from_pretrained` leaves them if the file has no bank: `empty_like`, without any call."""
    criterion = on_meta()
    for module in criterion.modules():
        for name, value in list(module._buffers.items()):
            if value is not None:
                limit = 2**30 if value.dtype == torch.int32 else 2**62
                setattr(module, name, torch.full_like(value, min(garbage, limit), device="cpu"))
    notice = {"call": lambda: step(criterion), "train": criterion.train, "eval": criterion.eval}[notices]
    with pytest.warns(
        UserWarning, match=r"a memory bank was built on the meta device .*reset_parameters\(\)"
    ):
        found = notice()
    if notices == "call":
        assert not found
        assert criterion.step == 1
        assert (criterion.bank.region_fill == 2).all()
    else:
        assert is_new(criterion)


def test_buffers_that_a_loader_filled_are_kept():
    """The same loader with a file that has the bank."""
    saved, criterion = trained(2), on_meta()
    for name, value in state(saved).items():
        owner, _, buffer = name.rpartition(".")
        setattr(criterion.get_submodule(owner), buffer, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        criterion.train()
        assert goes_on_like(criterion, saved)


def test_reset_parameters_fills_what_the_module_owns():
    criterion = trained(2)
    criterion.contrast.reset_parameters()
    assert criterion.step == 0
    assert (criterion.bank.region_fill > 0).all()
    criterion.bank.reset_parameters()
    assert is_new(criterion)


def test_class_weights_of_a_criterion_from_meta(poison):
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def build():
        with torch.device("meta"):
            return make(class_weights=weights)

    assert torch.equal(build().to_empty(device="cpu").class_weights, weights)
    criterion = build()
    for module in criterion.modules():
        for name, value in list(module._buffers.items()):
            setattr(module, name, torch.empty_like(value, device="cpu"))
    with pytest.warns(UserWarning, match="a memory bank was built on the meta device"):
        criterion.train()
    assert torch.equal(criterion.class_weights, weights)
    unknown = make(class_weights=weights.to("meta"))
    unknown.contrast._born_on_meta = True
    unknown.class_weights = torch.full((4,), torch.nan)
    with pytest.raises(ValueError, match="class_weights were given on the meta device and not loaded"):
        unknown.train()


def test_a_shorter_warm_up_than_that_of_the_file_is_over():
    saved, criterion = trained(3), on_meta()
    criterion.warmup_steps = 1
    for name, value in state(saved).items():
        owner, _, buffer = name.rpartition(".")
        setattr(criterion.get_submodule(owner), buffer, value)
    criterion.train()
    assert criterion.step == 3
    assert step(criterion)


def test_what_nobody_filled_is_not_compiled():
    criterion = on_meta()
    for module in criterion.modules():
        for name, value in list(module._buffers.items()):
            if value is not None:
                setattr(module, name, torch.zeros_like(value, device="cpu"))
    compiled = torch.compile(criterion, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"built on the meta device.*call train\(\)"):
        compiled(torch.randn(2, 4, 5, 7), torch.randn(2, 6, 5, 7), torch.zeros(2, 5, 7).long())


def test_a_state_dict_on_meta_is_refused():
    with pytest.raises(RuntimeError, match="keys: the checkpoint has a tensor on the meta device"):
        make().load_state_dict(on_meta().state_dict(), assign=True)


def test_a_checkpoint_of_the_contrast_from_before_it_had_a_warm_up():
    contrast = trained(2).contrast
    old = contrast.state_dict()
    del old["step"]
    old._metadata[""]["version"] = 1
    PixelContrastLoss(4, bank=make().bank).load_state_dict(old)
    del old._metadata
    with pytest.raises(RuntimeError, match=r'Missing key.*"step"'):
        PixelContrastLoss(4, bank=make().bank).load_state_dict(old)


def test_an_average_of_pointers_and_labels_is_refused():
    criterion = trained(1)
    averaged = AveragedModel(criterion, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for seed in range(1, 4):
        step(criterion, seed)
        averaged.update_parameters(criterion)
    with pytest.raises(RuntimeError, match=r"key_labels|_fill|_ptr"):
        make().load_state_dict(averaged.module.state_dict())


def test_a_checkpoint_with_the_count_beside_the_contrast():
    old = state(trained(2))
    old["step"] = old.pop("contrast.step")
    criterion = make()
    criterion.load_state_dict(old)
    assert criterion.step == 2


def test_a_bank_in_an_average_of_buffers_comes_back_to_unit_norm():
    criterion = PixelContrastLoss(4, min_pixels=1, bank=trained(1).bank)
    averaged = AveragedModel(criterion, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for seed in range(1, 5):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 4, (2, 5, 7), generator=generator)
        criterion(torch.randn(2, 6, 5, 7, generator=generator), labels, labels)
        averaged.update_parameters(criterion)
    bank = averaged.module.bank
    labelled = bank.key_labels >= 0
    assert (bank.keys.norm(dim=-1)[labelled] < 0.9).any()
    expected = nn.functional.normalize(bank.keys, dim=-1)[labelled]
    # Averaged pointers belong to no bank; only the rows can be mended here.
    whole = {**state(criterion.bank), "keys": bank.keys.clone()}
    loaded = MemoryBank(4, 6, region_slots=5, pixel_slots=9)
    with pytest.warns(UserWarning, match="do not have norm 1 .*EMA"):
        loaded.load_state_dict(whole)
    torch.testing.assert_close(loaded.keys[labelled], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded.load_state_dict(state(loaded))


def test_the_head_has_no_buffer_of_ours():
    """A network with its head can be saved, averaged and stripped like any other."""
    assert {name for name, _ in ProjectionHead(3, 4).named_buffers()} == {
        "project.1.running_mean",
        "project.1.running_var",
        "project.1.num_batches_tracked",
    }
