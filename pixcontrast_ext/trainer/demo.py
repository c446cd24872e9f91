"""The demo: one model trained twice on synthetic scenes, without and with the contrast, all else equal."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pixcontrast_ext.trainer.config import DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from pixcontrast_ext.trainer.data import dataset_spec
from pixcontrast_ext.trainer.distributed import Ranks, join_ranks
from pixcontrast_ext.trainer.evaluate import load_model
from pixcontrast_ext.trainer.files import held, write_json
from pixcontrast_ext.trainer.pictures import draw_curves, draw_panels, draw_tsne, pixel_features
from pixcontrast_ext.trainer.probe import ProbeConfig, probe_model
from pixcontrast_ext.trainer.probe import table as probe_table
from pixcontrast_ext.trainer.train import Result, train


@dataclass(frozen=True)
class DemoConfig:
    """Train a small model on synthetic scenes without and with the contrast, and show both."""

    out: Path = Path("runs/demo")
    """Folder of the demo; an earlier demo in it is replaced."""
    steps: int = 400
    """Optimiser steps of each run."""
    seed: int = 0
    """Seed of both runs: same weights at the start, same images in the same order, same augmentation."""
    batch_size: int = 8
    """Images per step."""
    synthetic_images: tuple[int, int] = (40, 96)
    """How many synthetic scenes to train and to validate on."""


_MARKER = "demo.json"
"""Says that a folder's runs are a demo's, and may be replaced by the next."""

ENDING = """\
off is the network without the contrast, bank the same with it: same weights at the start, same scenes, same order.
Above are the scores of its classifier, below them what its pixel features are worth without it. This is one seed:
another gives another difference in mIoU, of either sign. Two repeats of eight seeds with 40 scenes and 400 steps
showed better features, one of them a mIoU higher by 0.004 (docs/experiments.md); `compare` trains several of yours."""


def run_config(demo: DemoConfig, contrast: str) -> TrainConfig:
    """The config of one of the two runs; they differ in `contrast` and in their folder alone."""
    return TrainConfig(
        out=demo.out / contrast,
        steps=demo.steps,
        seed=demo.seed,
        log_every=5,
        batch_size=demo.batch_size,
        eval_every=-(-demo.steps // 6),
        checkpoint_every=demo.steps,
        pictures=False,
        data=DataConfig(synthetic_images=demo.synthetic_images, zoom=(0.9, 1.25), rotate=3.0, jitter=0.1),
        net=ModelConfig(embed_dim=128),
        loss=LossConfig(
            contrast=contrast,  # type: ignore[arg-type]
            region_slots=demo.synthetic_images[0],  # a region of each scene
            pixel_slots=200,
        ),
        optim=OptimConfig(optimizer="adamw", lr=4e-3, lr_warmup=20, weight_decay=1e-2, clip=5.0),
    )


def demo(config: DemoConfig) -> dict[str, Result]:
    """Train both, draw the pictures, print the tables. Returns the results by name: "off" and "bank".

    An earlier demo's runs are replaced. Raises FileExistsError if the folder has others of these names.
    """
    configs = {contrast: run_config(config, contrast) for contrast in ("off", "bank")}
    for run in configs.values():
        if run.out.exists() and not (config.out / _MARKER).exists():
            raise FileExistsError(
                f"{run.out} was not left by a demo, which would replace it: choose another --out"
            )
    with join_ranks() as ranks:
        ranks.wait()  # all have looked at what is there
        with ranks.hold(config.out):
            return _train_and_show(config, configs, ranks)


def _train_and_show(config: DemoConfig, configs: dict[str, TrainConfig], ranks: Ranks) -> dict[str, Result]:
    if ranks.is_first:
        write_json(config.out / _MARKER, {**vars(config), "out": str(config.out)})
        for run in configs.values():
            if run.out.exists():
                with held(run.out):
                    pass  # nobody trains in it
                shutil.rmtree(run.out)
    ranks.wait()
    results = {name: train(run) for name, run in configs.items()}
    if not ranks.is_first:
        return results
    spec = dataset_spec("synthetic")
    scenes = spec.build(configs["off"].data, "val")
    models = {
        name: load_model(run.out, ranks.device, with_embed_head=True)[0] for name, run in configs.items()
    }
    clouds = {
        "off: features": pixel_features(models["off"], scenes, ranks.device),
        "bank: features": pixel_features(models["bank"], scenes, ranks.device),
        "bank: embeddings": pixel_features(models["bank"], scenes, ranks.device, embeddings=True),
    }
    probes = {
        name: probe_model(model, configs[name].data, ProbeConfig(images=60), ranks.device, config.steps)[0]
        for name, model in models.items()
    }
    pictures = [
        draw_curves({name: run.out for name, run in configs.items()}, config.out / "curves.png"),
        draw_panels(models, scenes, spec, config.out / "panels.png", ranks.device),
        draw_tsne(clouds, spec, config.out / "tsne.png"),
    ]
    print(table(results), probe_table(probes), ENDING, sep="\n\n")
    print("\nPictures:", *pictures, sep="\n  ")
    return results


def table(results: dict[str, Result]) -> str:
    """Mean and per-class IoU on val and the time of a step, a column per run."""
    rows = [["", *results]]
    rows.append(["mIoU", *(f"{result.miou:.3f}" for result in results.values())])
    rows.extend(
        [f"  {name}", *(f"{result.class_iou[name]:.3f}" for result in results.values())]
        for name in next(iter(results.values())).class_iou
    )
    rows.append(["ms per step", *(f"{result.seconds_per_step * 1e3:.0f}" for result in results.values())])
    width = max(len(row[0]) for row in rows)
    return "\n".join(row[0].ljust(width) + "".join(cell.rjust(9) for cell in row[1:]) for row in rows)
