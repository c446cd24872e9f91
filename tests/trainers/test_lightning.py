"""Lightning with its plain `ddp`, which demands a gradient for every parameter in every step."""

from __future__ import annotations

from pathlib import Path

import pytest

import two_ranks

pytest.importorskip("lightning", reason="lightning is not installed: make test-trainers")


def test_two_ranks_stay_alike_through_the_warm_up(tmp_path):
    two_ranks.run(tmp_path, Path(__file__).with_name("lightning_ranks.py"), tmp_path)
    two_ranks.check(tmp_path)
