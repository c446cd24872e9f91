"""Lightning with plain `ddp`, which demands a gradient for every parameter in every step."""

from __future__ import annotations

import pytest

from tests.support import two_ranks

pytest.importorskip("lightning", reason="lightning is not installed: make test-trainers")


def test_two_ranks_stay_alike_through_the_warm_up(tmp_path):
    two_ranks.run(tmp_path, "-m", "tests.support.lightning_ranks", tmp_path)
    two_ranks.check(tmp_path)
