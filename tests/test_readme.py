"""The training loops of README and of the guide, run verbatim and looked at; `test_distributed.py` runs it on ranks."""

from __future__ import annotations

import torch

from tests.support.distributed_worker import plain_torch
from tests.support.pages import ROOT, blocks


def parameters_of(module):
    return [weight.detach().clone() for weight in module.parameters()]


def moved(before, module):
    return [bool((a != b).any()) for a, b in zip(before, module.parameters(), strict=True)]


def test_the_training_loop_of_the_guide():
    lines, names = plain_torch(), {}
    lines.data.run(names)
    lines.setup.run(names)
    names["loader"] = [(torch.randn(2, 3, 64, 64), torch.randint(0, 2, (2, 64, 64))) for _ in range(3)]
    network, head = names["network"], names["model"].head
    before = parameters_of(network), parameters_of(head)
    lines.loop.run(names)
    assert names["loss"].isfinite()
    assert names["criterion"].step == 3
    assert set(names["parts"]) == {"cross_entropy", "contrast", "anchors", "bank_fill"}
    assert (names["bank"].region_fill[:2] == 6).all()
    assert all(moved(before[0], network))
    assert not any(moved(before[1], head))  # during the warm-up
    names["criterion"].step.fill_(5000)
    lines.loop.run(names)
    assert names["parts"]["contrast"] > 0
    assert all(moved(before[0], network))
    assert any(moved(before[1], head))


def test_the_training_loop_of_readme():
    """It reaches the contrast: the bank has its batches, and the head has learned."""
    (block,) = blocks(ROOT / "README.md", "python")
    names = {}
    block.run(names)
    criterion = names["criterion"]
    assert names["loss"].isfinite()
    assert criterion.step == criterion.warmup_steps < 4
    assert (criterion.bank.region_fill == 4 * 2).all()
    gradients = [weight.grad for weight in names["model"].head.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
