"""Mean and per-class IoU of a model over all ranks, from the confusion matrix of its pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from pixcontrast_ext.trainer.checkpoints import CheckpointError, CheckpointStore, read_checkpoint
from pixcontrast_ext.trainer.config import TrainConfig, config_of
from pixcontrast_ext.trainer.data import IGNORE, Sample, dataset_spec, eval_loader, to_device
from pixcontrast_ext.trainer.distributed import Ranks
from pixcontrast_ext.trainer.models import build_model, drop_embed_head, load_weights


@dataclass(frozen=True)
class Scores:
    """IoU of each class (NaN for a class that neither truth nor prediction has) and their mean."""

    miou: float
    class_iou: dict[str, float]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients, for the length of the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def predict(model: nn.Module, images: Tensor, size: Sequence[int], amp: str = "off") -> Tensor:
    """Class of every pixel, [B, *size] int64, for images [B, 3, H, W] in [0, 1]."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp == "bf16"):
        logits = model(images)["seg"]
    return F.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=False).argmax(1)


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """How many pixels of each class (row) are predicted as each class (column), [C, C] int64.

    Pixels labelled `IGNORE` do not count. `labels` and `predictions` are int64 of one shape.
    """
    counted = labels != IGNORE
    cells = labels[counted] * num_classes + predictions[counted]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, [C] float64; NaN for one that neither truth nor prediction has."""
    hits = confusion.diagonal().double()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def evaluate(
    model: nn.Module,
    dataset: Dataset[Sample],
    classes: tuple[str, ...],
    ranks: Ranks,
    *,
    batch_size: int = 8,
    amp: str = "off",
) -> Scores:
    """IoU over the whole dataset, each rank predicting its share. Pixels labelled `IGNORE` do not count."""
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=ranks.device)
    with evaluating(model):
        for batch in eval_loader(dataset, batch_size, rank=ranks.rank, world=ranks.world):
            images, labels = to_device(batch, ranks.device)
            confusion += confusion_matrix(
                labels, predict(model, images, labels.shape[-2:], amp), len(classes)
            )
    iou = class_iou(ranks.sum(confusion))
    return Scores(float(iou.nanmean()), dict(zip(classes, iou.tolist(), strict=True)))


def load_model(
    path: Path, device: torch.device, *, with_embed_head: bool = False
) -> tuple[nn.Module, TrainConfig, int]:
    """The model of a checkpoint, in eval mode on `device`, with the config and the step it was trained to.

    Args:
        path: a checkpoint, or the folder of a run, which stands for its newest whole checkpoint.
        with_embed_head: keep the projection head, if the run had one.

    Raises CheckpointError if there is none or it is damaged, ValueError if the weights do not fit the model.
    """
    if path.is_dir():
        found = CheckpointStore(path / "checkpoints").load_latest()
        if found is None:
            raise CheckpointError(f"run {path} has no checkpoint")
        path, state = found
    else:
        state = read_checkpoint(path)
    config = config_of(state["config"], path)
    num_classes = len(dataset_spec(config.data.dataset).classes)
    model = build_model(config.net.model, num_classes, config.net.embed_dim, config.net.head)
    if not with_embed_head or config.loss.contrast == "off":
        drop_embed_head(model)
    load_weights(model, state["model"])
    return model.to(device).eval(), config, int(state["step"])
