"""README's training loop, run verbatim; `test_distributed.py` runs it on several ranks."""

from __future__ import annotations

import torch

from tests.support.distributed_worker import Network, readme_blocks


def test_the_training_loop_of_readme():
    setup, loop, ranks = readme_blocks()
    names = {"network": Network(), "device": "cpu"}
    exec(setup, names)
    names["loader"] = [(torch.randn(2, 3, 16, 16), torch.randint(0, 2, (2, 64, 64))) for _ in range(3)]
    before = [weight.clone() for weight in names["model"].parameters()]
    exec(loop, names)
    assert names["loss"].isfinite()
    assert names["criterion"].step == 3
    assert set(names["parts"]) == {"cross_entropy", "contrast", "anchors", "bank_fill"}
    assert (names["bank"].region_fill[:2] == 6).all()
    moved = [bool((a != b).any()) for a, b in zip(before, names["model"].parameters(), strict=True)]
    assert moved[:4] == [True] * 4  # the network
    assert not any(moved[4:])  # the head does not move during the warm-up
    names["criterion"].step.fill_(5000)
    exec(loop, names)
    assert names["parts"]["contrast"] > 0
    moved = [bool((a != b).any()) for a, b in zip(before, names["model"].parameters(), strict=True)]
    assert all(moved[:4])
    assert any(moved[4:])
    assert "DistributedDataParallel(model)" in ranks
