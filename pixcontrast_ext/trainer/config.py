"""What a run is made of, as dataclasses, and how it is written down.

Every field is a command-line flag of the same name (`batch_size` is `--batch-size`), and a config file is
those flags as one flat JSON object: `{"dataset": "camvid", "lr": 0.02}`. So a file is checked by the very
parser that checks the command line, and the file saved with a run can be handed back with `--config`. JSON has no
comments: a key that begins with an underscore is one.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import tyro

from pixcontrast_ext.trainer.files import write_text

Config = TypeVar("Config")

RECIPES = Path(__file__).parent / "recipes"
"""The folder of config files for the paper's experiments, which `--config` takes by their name."""


@dataclass(frozen=True)
class DataConfig:
    """Where images and labels come from and how they are varied."""

    dataset: str = "synthetic"
    """synthetic (generated, needs no files), camvid, cityscapes, pascal_context (59 classes), pascal_context_60 (with
    background), coco_stuff or coco_stuff_10k."""
    root: Path | None = None
    """Folder of a dataset that is read from files."""
    size: tuple[int, int] | None = None
    """Height and width to resize to (synthetic: to draw at; 96 96 unless given)."""
    scale: float = 1.0
    """Resize by this factor instead, e.g. 0.5 for half size. Labels are resized to the nearest pixel."""
    short_side: int | None = None
    """Resize so that the shorter side has so many pixels instead."""
    train_splits: tuple[str, ...] = ("train",)
    """Splits to train on, as in: train val."""
    train_fraction: float = 1.0
    """Share of their images, above 0 to 1, that is trained on; spread evenly: 0.125 is about every eighth."""
    train_ids: bool = False
    """Cityscapes: read the *_labelTrainIds.png made beforehand rather than map the *_labelIds.png."""
    data_seed: int = 0
    """Seed of the synthetic scenes."""
    synthetic_images: tuple[int, int] = (512, 96)
    """How many synthetic scenes to train and to validate on."""
    workers: int = 0
    """Processes that load data, per rank; 0 loads in the training process."""
    augment: bool = True
    """Recolour, flip, zoom, rotate and crop the training images."""
    crop: tuple[int, int] | None = None
    """Height and width of a random training crop; the whole image unless given."""
    zoom: tuple[float, float] = (0.75, 1.5)
    """Range of the random zoom."""
    rotate: float = 5.0
    """Largest random rotation, in degrees."""
    jitter: float = 0.2
    """Strength of the random change of brightness, contrast and saturation; 0 for none."""


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    model: str = "compact"
    """compact, or from the extra models: deeplabv3_resnet50, deeplabv3_resnet101, hrnet_w18, hrnet_w48, hrnet_w18_ocr,
    hrnet_w48_ocr, as the authors of the contrast built them; deeplabv3_..._torchvision, hrnet_w..._v2 and
    hrnet_w..._v2_ocr as torchvision and the networks' own papers have them."""
    align_corners: bool = False
    """Upsample logits, and HRNet's branches, with aligned corners."""
    weights: Path | None = None
    """File of weights for the backbone to start from."""
    pretrained: bool = False
    """Without such a file, start from the ImageNet weights timm publishes, fetched once over the network."""
    embed_dim: int = 256
    """Width of the pixel embeddings."""
    head: Literal["convmlp", "linear"] = "convmlp"
    """Kind of projection head."""


@dataclass(frozen=True)
class LossConfig:
    """Cross-entropy and pixel contrast."""

    contrast: Literal["off", "batch", "bank"] = "bank"
    """off: cross-entropy alone. batch: contrast within the batch. bank: contrast with the memory bank."""
    weight: float = 0.1
    """Weight of the contrast term."""
    aux_weight: float = 0.4
    """Weight of the cross-entropy of a model's auxiliary head, if it has one."""
    class_weights: str = "off"
    """Weights of the classes in the cross-entropy. off: none. auto: by median frequency, counted from the training
    labels. Or a JSON file of class names and weights, or the name of one that the package has: cityscapes."""
    warmup_steps: int = 0
    """Steps of cross-entropy alone (the bank fills meanwhile)."""
    temperature: float = 0.1
    """Temperature of the contrast."""
    base_temperature: float | None = None
    """Scales the contrast by temperature / base temperature; not scaled unless given."""
    max_samples: int = 1024
    """Anchors per step."""
    max_views: int = 50
    """Anchors per class and image, at most."""
    min_pixels: int | None = 5
    """A class with fewer pixels in an image gives no anchors there; None for max_views + 1."""
    anchors: Literal["hard", "random"] = "hard"
    """hard: a share of the anchors are mispredicted pixels. random: whatever was predicted."""
    hard_fraction: float = 0.5
    """That share, from 0 to 1."""
    min_purity: float = 0.0
    """A pixel of the embeddings counts only if its label covers at least this share, from 0 to 1, of the labels under
    it."""
    max_samples_over: Literal["rank", "ranks"] = "rank"
    """rank: every rank takes max_samples anchors. ranks: all of them together."""
    mining: Literal["off", "random", "semi-hard", "hardest"] = "off"
    """Keys to contrast an anchor with. off: all. random: some. semi-hard: some of the hardest. hardest: the hardest."""
    mining_negatives: int = 2048
    """Negatives of an anchor, about."""
    mining_positives: int = 1024
    """Positives of an anchor, about, at most."""
    mining_fraction: float = 0.1
    """Share of the keys that semi-hard takes for hard, from above 0 to 1."""
    region_slots: int = 500
    """Region embeddings the bank keeps per class."""
    pixel_slots: int = 500
    """Pixel embeddings the bank keeps per class."""
    pixels_per_image: int = 10
    """Pixel embeddings the bank takes per class and image."""
    bank_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of the bank, and of the contrast's products."""
    project: Literal["all", "used"] = "all"
    """all: the projection head reads every pixel. used: only the anchors, and pixels drawn for the bank."""
    bank_samples: int = 4096
    """With used: pixels drawn for the bank per step and rank, at most."""
    region_views: int = 64
    """With used: pixels drawn for the bank per class and image, at most."""
    backend: str | None = None
    """Backend of the loss; the best that is available unless given."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule: lr x (1 - step / steps) ** power after a linear rise."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Kind of optimiser."""
    lr: float = 0.05
    """Highest learning rate."""
    head_lr: float = 1.0
    """Learning rate of all but the backbone, as a multiple of that of the backbone."""
    lr_warmup: int = 0
    """Steps over which the learning rate rises."""
    power: float = 0.9
    """Power of the polynomial decay; 0 keeps the rate constant."""
    momentum: float = 0.9
    """Momentum (sgd)."""
    nesterov: bool = True
    """Nesterov's momentum (sgd)."""
    weight_decay: float = 1e-4
    """Weight decay of the convolution weights."""
    clip: float = 0.0
    """Largest gradient norm; 0 does not clip."""


@dataclass(frozen=True)
class InferenceConfig:
    """How an image is predicted: what it is averaged over, windows, scales and flips."""

    window: tuple[int, int] | None = None
    """Height and width of a window that slides over the image; the whole image at once unless given."""
    stride: tuple[int, int] | None = None
    """How far the window moves down and to the right; two thirds of it unless given."""
    scales: tuple[float, ...] = (1.0,)
    """Resize the image by each of these factors, e.g. 0.5 0.75 1 1.25 1.5 1.75."""
    flip: bool = False
    """Predict the mirror image too."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged over them."""

    def validate(self) -> None:
        """Raises ValueError that names the first option out of range and its value."""
        for name, extent in (("window", self.window), ("stride", self.stride)):
            _require(extent is None or min(extent) >= 1, name, extent, "at least 1 by 1")
        _require(bool(self.scales), "scales", self.scales, "at least one number")
        _require(
            all(math.isfinite(scale) and scale > 0 for scale in self.scales),
            "scales", self.scales, "finite and above 0",
        )  # fmt: skip
        if self.stride is not None:
            _require(self.window is not None, "stride", self.stride, "left out where there is no --window")
        if self.window is not None and self.stride is not None:
            _require(
                self.stride[0] <= self.window[0] and self.stride[1] <= self.window[1],
                "stride", self.stride, f"at most the window, {self.window}, or pixels between go unseen",
            )  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a training run."""

    out: Path = Path("runs/train")
    """Folder of the run."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 8
    """Images per step, over all ranks."""
    seed: int = 0
    """Seed of the weights, the data order and the augmentation."""
    stop_after: int | None = None
    """End after this step of the schedule, for other runs to branch from."""
    branch_from: Path | None = None
    """Checkpoint or folder of a run to go on from at its step, with its weights and its optimiser's state; a head that
    it lacks is new, and the bank is empty. Its steps count for the warm-up."""
    amp: Literal["off", "bf16"] = "off"
    """Mixed precision of the model."""
    compile: bool = False
    """Run the model through torch.compile."""
    device: str = "auto"
    """cuda, cpu, or auto for cuda where there is one."""
    log_every: int = 10
    """Steps between rows of train.csv."""
    diagnose_every: int = 0
    """Steps between rows of diagnostics.csv: what the contrast finds, and its gradient beside the cross-entropy's. 0
    for none."""
    eval_every: int = 200
    """Steps between evaluations on val (and one at the end)."""
    checkpoint_every: int = 200
    """Steps between checkpoints (and one at the end)."""
    keep_checkpoints: int = 3
    """Checkpoints to keep."""
    pictures: bool = True
    """Draw pictures at the end."""
    data: DataConfig = field(default_factory=DataConfig)
    net: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How eval and predict predict, unless they are told otherwise. Evaluations on the way take an image as it is."""

    @property
    def last_step(self) -> int:
        """The step that ends the run."""
        return self.steps if self.stop_after is None else self.stop_after

    def validate(self) -> None:
        """Raises ValueError that names the first option out of range and its value."""
        loss, optim, data = self.loss, self.optim, self.data
        self.inference.validate()
        at_least_one = {
            "steps": self.steps, "batch-size": self.batch_size, "log-every": self.log_every,
            "eval-every": self.eval_every, "checkpoint-every": self.checkpoint_every,
            "keep-checkpoints": self.keep_checkpoints, "embed-dim": self.net.embed_dim,
        }  # fmt: skip
        at_least_one |= {
            "mining-negatives": loss.mining_negatives, "mining-positives": loss.mining_positives,
            "bank-samples": loss.bank_samples, "region-views": loss.region_views,
        }  # fmt: skip
        not_negative = {
            "seed": self.seed, "diagnose-every": self.diagnose_every,
            "data-seed": data.data_seed, "workers": data.workers, "rotate": data.rotate,
            "jitter": data.jitter, "weight": loss.weight, "aux-weight": loss.aux_weight,
            "warmup-steps": loss.warmup_steps, "region-slots": loss.region_slots,
            "pixel-slots": loss.pixel_slots, "pixels-per-image": loss.pixels_per_image,
            "lr-warmup": optim.lr_warmup, "power": optim.power, "momentum": optim.momentum,
            "weight-decay": optim.weight_decay, "clip": optim.clip,
        }  # fmt: skip
        _require(
            self.stop_after is None or 1 <= self.stop_after <= self.steps,
            "stop-after", self.stop_after, f"from 1 to --steps {self.steps}",
        )  # fmt: skip
        for name, value in at_least_one.items():
            _require(value >= 1, name, value, "at least 1")
        for name, number in not_negative.items():
            _require(math.isfinite(number) and number >= 0, name, number, "finite and not negative")
        _require(
            loss.contrast != "bank" or loss.region_slots + min(loss.pixel_slots, loss.pixels_per_image) > 0,
            "region-slots", loss.region_slots, "above 0 where the bank keeps no pixels",
        )  # fmt: skip
        for name, share in (("hard-fraction", loss.hard_fraction), ("min-purity", loss.min_purity)):
            _require(0 <= share <= 1, name, share, "from 0 to 1")
        _require(
            0 < loss.mining_fraction <= 1, "mining-fraction", loss.mining_fraction, "above 0 and at most 1"
        )
        for name, rate in (("lr", optim.lr), ("head-lr", optim.head_lr)):
            _require(math.isfinite(rate) and rate > 0, name, rate, "finite and above 0")
        _require(math.isfinite(data.scale) and data.scale > 0, "scale", data.scale, "finite and above 0")
        _require(0 < data.train_fraction <= 1, "train-fraction", data.train_fraction, "above 0 and at most 1")
        _require(0 < data.zoom[0] <= data.zoom[1] < math.inf, "zoom", data.zoom, "0 < low <= high")
        _require(min(data.synthetic_images) >= 1, "synthetic-images", data.synthetic_images, "at least 1")
        for name, extent in (("size", data.size), ("crop", data.crop)):
            _require(extent is None or min(extent) >= 1, name, extent, "at least 1 by 1")
        _require(
            data.size is None or data.scale == 1.0, "scale", data.scale, "left out where --size is given"
        )
        _require(data.short_side is None or data.short_side >= 1, "short-side", data.short_side, "at least 1")
        _require(
            data.short_side is None or (data.size is None and data.scale == 1.0),
            "short-side", data.short_side, "left out where --size or --scale is given",
        )  # fmt: skip


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"--{name} is {value!r}, must be {wanted}")


def parse_flags(command: type[Config], args: Sequence[str], *, prog: str | None = None) -> Config:
    """The dataclass `command` from command-line flags. Prints usage and exits on a flag that does not fit."""
    parsed: Config = _parsed(cast(Any, command), tuple(args), prog)
    return parsed


# Tyro takes a tenth of a second, and a comparison asks for each run several times.
@functools.lru_cache(maxsize=256)
def _parsed(command: Any, args: tuple[str, ...], prog: str | None) -> Any:
    return tyro.cli(command, args=args, prog=prog, config=(tyro.conf.OmitArgPrefixes,))


def flatten(config: Any) -> dict[str, Any]:
    """Nested dataclass -> flat, JSON-ready dict of its leaves."""
    flat: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            flat.update(flatten(value))
        else:
            flat[item.name] = str(value) if isinstance(value, Path) else value
    return flat


def save_config(config: TrainConfig, path: Path) -> None:
    """Write `config` as a flat JSON file that `--config` and `load_config` read back."""
    write_text(path, json.dumps(flatten(config), indent=2) + "\n")


def load_config(path: Path) -> TrainConfig:
    """Read a config file. Options it leaves out keep their defaults. Errors: see `flags_of_file`."""
    return parse_flags(TrainConfig, flags_of_file(path), prog=str(path))


def config_of(options: dict[str, Any], where: Path) -> TrainConfig:
    """The config of a flat dict of options, as `flatten` gives it; errors name `where` it is from."""
    return parse_flags(TrainConfig, flags_of(options, where), prog=str(where))


def flags_of_file(path: Path) -> list[str]:
    """A config file as command-line flags, to be put before those of the command line, which so override it.

    Args:
        path: of the file, or the name of a recipe: `Path("cityscapes_hrnet_w48")`.

    Raises:
        FileNotFoundError: there is no such file and no such recipe.
        ValueError: it is not a JSON object, or has a key that is no option; both name the file.
    """
    if not path.is_file():
        recipes = {recipe.stem: recipe for recipe in sorted(RECIPES.glob("*.json"))}
        if str(path) not in recipes:
            raise FileNotFoundError(
                f"config file {path} does not exist, nor is it a recipe; those are {', '.join(recipes)}"
            )
        path = recipes[str(path)]
    try:
        options = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"config file {path} is not valid JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(
            f"config file {path} must hold one JSON object of options, found {type(options).__name__}"
        )
    return flags_of(options, path)


def flags_of(options: dict[str, Any], where: Path) -> list[str]:
    """A flat dict of options as flags; keys that begin with an underscore are comments. Errors name `where`."""
    options = {name: value for name, value in options.items() if not name.startswith("_")}
    unknown = sorted(set(options) - set(flatten(TrainConfig())))
    if unknown:
        raise ValueError(f"{where} has unknown options: {', '.join(unknown)}")
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            flags += [f"--{flag}", *(str(each) for each in values)]
    return flags
