"""Sampling and enqueue on inputs drawn by hypothesis, against the rules as loops."""

from __future__ import annotations

import pytest
import torch

from tests.support.backends import BACKENDS, SHARE
from tests.support.checks import check_bank, check_sampling, make_bank
from tests.support.inputs import draw_maps

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BY_NO_CLOCK = settings(
    max_examples=-(-60 // SHARE), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@settings(BY_NO_CLOCK)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(1, 5), st.integers(1, 40), st.integers(1, 9),
    st.integers(0, 9), st.integers(0, 100), st.floats(0, 1), st.floats(0, 1), st.integers(1, 50), st.integers(0, 10**6),
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_input_is_sampled_by_the_rules(
    backend,
    batch,
    height,
    width,
    classes,
    max_samples,
    max_views,
    min_pixels,
    hard_percent,
    ignored,
    wrong,
    priorities,
    seed,
):
    generator = torch.Generator().manual_seed(seed)
    maps = draw_maps(
        batch, height, width, classes,
        ignored=ignored, wrong=wrong, priorities=priorities, generator=generator,
    )  # fmt: skip
    check_sampling(
        maps.labels,
        maps.predictions,
        maps.priority,
        backend,
        num_classes=classes,
        max_samples=max_samples,
        max_views=max_views,
        min_pixels=min_pixels,
        hard_fraction=hard_percent / 100,
    )


@settings(BY_NO_CLOCK)
@given(
    st.integers(1, 3), st.integers(4, 18), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 6),
    st.integers(0, 6), st.integers(0, 6), st.floats(0, 1), st.integers(1, 50), st.integers(0, 10**6),
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_input_is_enqueued_by_the_rules(
    backend, batch, channels, height, width, classes, regions, pixels, k, ignored, priorities, seed
):
    torch.manual_seed(seed)
    bank, rings = make_bank(classes, channels, regions, pixels, k)
    for _ in range(2):
        maps = draw_maps(
            batch, height, width, classes, channels=channels, ignored=ignored, priorities=priorities
        )
        bank.enqueue(maps.embeddings, maps.labels, priority=maps.priority, backend=backend)
        rings.enqueue(maps.embeddings, maps.labels, maps.priority)
    check_bank(bank, rings, atol=1e-5)  # a mean of opposite vectors loses digits
