"""What the trainer's tests share: runs that take seconds, and a way to start one as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pixcontrast_ext
from pixcontrast_ext.trainer.config import DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig


@pytest.fixture(autouse=True)
def one_thread():
    """As the subprocesses have: the bits of a sum depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds a config of 9 steps, 3 an epoch of 15 scenes of 32x48 (3 of which each epoch leaves out)."""

    def build(name: str = "run", contrast: str = "bank", **changes: object) -> TrainConfig:
        config = TrainConfig(
            out=tmp_path / name,
            steps=9,
            batch_size=4,
            device="cpu",
            log_every=2,
            eval_every=4,
            checkpoint_every=2,
            pictures=False,
            data=DataConfig(size=(32, 48), synthetic_images=(15, 3)),
            net=ModelConfig(embed_dim=16),
            loss=LossConfig(contrast=contrast, region_slots=6, pixel_slots=6, max_samples=64, warmup_steps=1),
            optim=OptimConfig(lr=0.02),
        )
        return replace(config, **changes)

    return build


@pytest.fixture
def environment() -> dict[str, str]:
    """For subprocesses: this very package, one thread."""
    root = str(Path(pixcontrast_ext.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def trainer(environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m pixcontrast_ext.trainer ARGS` to its end."""

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pixcontrast_ext.trainer", *map(str, args)]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )

    return run


@pytest.fixture
def camvid(tmp_path: Path) -> Callable[..., Path]:
    """Writes a little dataset in CamVid's layout, the upper half of each image sky and the lower road."""

    def build(
        suffix: str = ".png", splits: tuple[str, ...] = ("train", "val", "test"), count: int = 4
    ) -> Path:
        root = tmp_path / "camvid"
        rng = np.random.default_rng(0)
        label = np.zeros((36, 48), np.uint8)
        label[18:], label[30:, :8] = 3, 11
        for split in splits:
            (root / split).mkdir(parents=True)
            (root / f"{split}annot").mkdir()
            for number in range(count):
                image = np.where(label[..., None] == 0, (200, 220, 250), (90, 80, 100)) + rng.integers(
                    -9, 5, 3
                )
                Image.fromarray(image.astype(np.uint8)).save(root / split / f"{split}{number}{suffix}")
                Image.fromarray(label).save(root / f"{split}annot" / f"{split}{number}.png")
        return root

    return build
