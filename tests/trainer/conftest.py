"""Shared by the trainer's tests: runs that take seconds, and a way to start one as a user would."""

from __future__ import annotations

import gc
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
from scipy.io import savemat

import pixcontrast_ext
from pixcontrast_ext.trainer.config import DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from tools import processes
from tools.torchvision_ops import declare_missing_ops

declare_missing_ops()


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Keeps imports out of garbage collection: a run collects before it measures memory, which took a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def quick_tsne(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of t-SNE's iterations, for tests that do not depend on where it puts the pixels."""
    from sklearn.manifold import TSNE

    fit = TSNE.fit_transform
    monkeypatch.setattr(TSNE, "fit_transform", lambda self, rows: fit(self.set_params(max_iter=250), rows))


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, like the subprocesses: the bits of a sum depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(out: Path, contrast: str = "bank", **changes: object) -> TrainConfig:
    """9 steps, 3 per epoch, on 15 scenes of 32x48 (each epoch leaves out 3 of them)."""
    config = TrainConfig(
        out=out,
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


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds a tiny config, whose folder has the name given."""

    def build(name: str = "run", *arguments: str, **changes: object) -> TrainConfig:
        return tiny_config(tmp_path / name, *arguments, **changes)

    return build


@pytest.fixture(scope="module")
def tiny_of_module(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A config for a run that several tests look at and none changes."""
    return tiny_config(tmp_path_factory.mktemp("module") / "run", steps=2)


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment for subprocesses: this very package, one thread."""
    root = str(Path(pixcontrast_ext.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def trainer(environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m pixcontrast_ext.trainer ARGS` to its end."""

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pixcontrast_ext.trainer", *args]
        return processes.run(command, env=environment, cwd=tmp_path)

    return run


@pytest.fixture
def camvid(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small dataset in CamVid's layout; the upper half of each image is sky, the lower half road."""

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


@pytest.fixture
def on_disk() -> Callable[..., None]:
    """Writes an image file of noise and a label file of the values given, making their folders."""

    def write(image: Path, label: Path, values: np.ndarray) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (*values.shape, 3), np.uint8)
        for path, content in ((image, noise), (label, values)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path)

    return write


@pytest.fixture
def cityscapes(tmp_path: Path, on_disk: Callable[..., None]) -> Path:
    """Two cities per split, and the other files of the official folders. Labels hold every id, 0-33."""
    root = tmp_path / "cityscapes"
    ids = np.arange(34, dtype=np.uint8).repeat(6).reshape(12, 17)
    for split, cities in (("train", ("aachen", "zurich")), ("val", ("munster", "lindau"))):
        for city in cities:
            for number in (19, 20):
                name = f"{city}_000000_{number:06d}"
                folder = root / "gtFine" / split / city
                on_disk(
                    root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png",
                    folder / f"{name}_gtFine_labelIds.png",
                    ids,
                )
                Image.fromarray(ids).save(folder / f"{name}_gtFine_instanceIds.png")
                (folder / f"{name}_gtFine_polygons.json").write_text("{}")
    return root


@pytest.fixture
def pascal_context(tmp_path: Path, on_disk: Callable[..., None]) -> Path:
    """Images of two sizes; one image is in no list. Labels hold every value, 0-59."""
    root = tmp_path / "VOC2010"
    lists = root / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    values = np.arange(60, dtype=np.uint8).repeat(2)
    for number in range(5):
        shape = (10, 12) if number % 2 else (8, 15)
        on_disk(
            root / "JPEGImages" / f"2008_{number:06d}.jpg",
            root / "SegmentationClassContext" / f"2008_{number:06d}.png",
            values.reshape(shape),
        )
    (lists / "train.txt").write_text("2008_000000\n2008_000001\n")
    (lists / "val.txt").write_text("2008_000003\n2008_000002\n")
    return root


@pytest.fixture
def coco_stuff(tmp_path: Path, on_disk: Callable[..., None]) -> Path:
    """Labels hold every id, 0-181, and 255."""
    root = tmp_path / "coco"
    values = np.array([*range(182), 255], np.uint8).repeat(2).reshape(6, 61)
    for split, first in (("train", 9), ("val", 139)):
        for number in (first, first + 16):
            on_disk(
                root / "images" / f"{split}2017" / f"{number:012d}.jpg",
                root / "annotations" / f"{split}2017" / f"{number:012d}.png",
                values,
            )
    return root


@pytest.fixture
def coco_stuff_10k(tmp_path: Path) -> Path:
    """Two images to train on and one to test, whose labels are matrices of every id."""
    root = tmp_path / "coco10k"
    for folder in ("images", "annotations", "imageLists"):
        (root / folder).mkdir(parents=True)
    ids = np.arange(183, dtype=np.uint16).reshape(3, 61)
    for name in ("one", "two", "three"):
        Image.fromarray(np.zeros((3, 61, 3), np.uint8)).save(root / "images" / f"{name}.jpg")
        savemat(root / "annotations" / f"{name}.mat", {"S": ids, "names": np.array(["a", "b"], object)})
    (root / "imageLists" / "train.txt").write_text("one\ntwo\n")
    (root / "imageLists" / "test.txt").write_text("three\n")
    return root
