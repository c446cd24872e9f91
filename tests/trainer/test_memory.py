"""The peak memory that a run records, and a bound that is checked with it."""

from __future__ import annotations

import math

import pytest
import torch

from pixcontrast_ext import MemoryBank
from pixcontrast_ext.trainer.memory import PeakMemory


@pytest.fixture
def watch():
    watch = PeakMemory(torch.device("cpu"))
    if not watch.known:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    return watch


def test_the_reference_copies_the_map_for_one_class_at_a_time(watch):
    """One copy per class would take 46 GB with the 171 classes of COCO-Stuff."""
    embeddings = torch.randn(1, 64, 400, 400)
    labels = torch.randint(0, 20, (1, 400, 400))
    bank = MemoryBank(20, 64, region_slots=2, pixel_slots=2, pixels_per_image=1)
    watch.restart()
    before = watch.mib()
    bank.enqueue(embeddings, labels, backend="reference")
    assert watch.mib() - before < 10 * embeddings.nbytes / 2**20


def test_peak_memory_is_of_what_came_after_a_restart(watch):
    watch.restart()
    before = watch.mib()
    large = torch.ones(256 * 2**18)  # 256 MiB
    assert 250 < watch.mib() - before < 300
    del large
    assert watch.mib() - before > 250
    watch.restart()
    assert watch.mib() - before < 50


def test_a_peak_that_cannot_be_known_is_nan(monkeypatch):
    def refuse(path, text):
        raise PermissionError(path)

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert math.isnan(PeakMemory(torch.device("cpu")).mib())
