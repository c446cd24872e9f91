"""The loss inside transformers: its Trainer on two ranks, and `from_pretrained`.

The latter builds on the meta device and loads tensor by tensor, without `load_state_dict`.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.support import two_ranks

pytest.importorskip("transformers", reason="transformers is not installed: make test-trainers")
pytest.importorskip("accelerate", reason="accelerate is not installed: make test-trainers")

from safetensors.torch import load_file, save_file

from tests.support import transformers_ranks


def test_two_ranks_stay_alike_through_the_warm_up(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", two_ranks.RANKS)
    script = ("-m", "tests.support.transformers_ranks")
    two_ranks.run(tmp_path, *torchrun, *script, tmp_path)
    two_ranks.check(tmp_path)


def train(model: torch.nn.Module, steps: int) -> list[bool]:
    """Whether the contrast reached the head, for each step."""
    model.train()
    images = two_ranks.Images()
    reached = []
    for step in range(steps):
        model.zero_grad()
        model(**{name: value[None] for name, value in images[step].items()})["loss"].backward()
        gradients = (weight.grad for weight in model.network.head.parameters())
        reached.append(any(grad is not None and bool(grad.any()) for grad in gradients))
    return reached


@pytest.fixture(params=[1, two_ranks.WARMUP_STEPS + 2], ids=["in the warm-up", "after it"])
def trained(request):
    torch.manual_seed(0)
    model = transformers_ranks.Model(transformers_ranks.Config())
    train(model, request.param)
    return model


def test_from_pretrained_goes_on_where_the_file_was_written(trained, tmp_path, poison):
    trained.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        restored = transformers_ranks.Model.from_pretrained(tmp_path)
    for name, value in trained.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name
    assert train(restored, 3) == train(trained, 3)
    assert torch.equal(restored.network.criterion.step, trained.network.criterion.step)
    bank, expected = restored.network.criterion.bank, trained.network.criterion.bank
    assert torch.equal(bank.region_fill, expected.region_fill)


@pytest.mark.parametrize("resets", [True, False])
def test_from_pretrained_of_a_file_without_criterion_starts_with_an_empty_bank(
    trained, tmp_path, poison, resets
):
    trained.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file(
        {name: value for name, value in state.items() if "criterion" not in name}, file, {"format": "pt"}
    )
    if resets:
        restored = transformers_ranks.ModelThatResets.from_pretrained(tmp_path)
    else:
        with pytest.warns(UserWarning, match="bank"):
            restored = transformers_ranks.Model.from_pretrained(tmp_path)
    criterion = restored.network.criterion
    assert criterion.step == 0
    for name, value in criterion.bank.named_buffers():
        assert (value == (-1 if name == "key_labels" else 0)).all(), name
    for name, value in trained.network.head.state_dict().items():
        assert torch.equal(restored.network.head.state_dict()[name], value), name
    assert train(restored, two_ranks.WARMUP_STEPS + 1) == [False] * two_ranks.WARMUP_STEPS + [True]
    assert criterion.bank.region_fill.sum() == 2 * (two_ranks.WARMUP_STEPS + 1)
