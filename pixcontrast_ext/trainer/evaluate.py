"""Trained models: their scores over all ranks, from a confusion matrix of pixels, and reading and exporting them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pixcontrast_ext.trainer.checkpoints import CheckpointError, CheckpointStore, read_checkpoint
from pixcontrast_ext.trainer.config import InferenceConfig, TrainConfig, config_of, flatten
from pixcontrast_ext.trainer.data import IGNORE, Sample, dataset_spec, to_device
from pixcontrast_ext.trainer.distributed import Ranks
from pixcontrast_ext.trainer.files import replacing
from pixcontrast_ext.trainer.inference import evaluating, predict
from pixcontrast_ext.trainer.models import build_model, drop_embed_head, load_weights, sisters


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says."""

    miou: float
    """Mean of the IoUs that are not NaN."""
    class_iou: dict[str, float]
    """Intersection over union of each class; NaN for one that the truth lacks."""
    pixel_accuracy: float
    """Share of the labelled pixels that are predicted right; NaN if there are none."""
    confusion: Tensor
    """Pixels of each class (row) predicted as each class (column), [C, C] int64, on the CPU."""


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """How many pixels of each class (row) are predicted as each class (column), [C, C] int64.

    Pixels labelled `IGNORE` do not count. `labels` and `predictions` are int64 of one shape.
    """
    counted = labels != IGNORE
    cells = labels[counted] * num_classes + predictions[counted]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, [C] float64, from `confusion_matrix`; NaN for one that the truth lacks.

    So the mean is over the same classes whatever is predicted.
    """
    hits, truth = confusion.diagonal().double(), confusion.sum(1)
    return torch.where(truth > 0, hits / (confusion.sum(0) + truth - hits), torch.nan)


def evaluate(
    model: nn.Module,
    loader: DataLoader[list[Sample]],
    classes: tuple[str, ...],
    ranks: Ranks,
    *,
    options: InferenceConfig | None = None,
    amp: str = "off",
) -> Scores:
    """The scores over a whole dataset, each rank predicting its share. Pixels labelled `IGNORE` do not count.

    Args:
        model: returns logits "seg".
        loader: of this rank's share, by `eval_loader`.
        classes: their names.
        ranks: all of which call this.
        options: how an image is predicted; at once, as it is, unless given.
        amp: mixed precision of the model, as in `TrainConfig`.
    """
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=ranks.device)
    # None: only a terminal gets a bar.
    hidden = None if ranks.is_first else True
    with evaluating(model):
        for stacks in tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=hidden):
            for batch in stacks:
                images, labels = to_device(batch, ranks.device)
                predictions = predict(model, images, labels.shape[-2:], options, amp)
                confusion += confusion_matrix(labels, predictions, len(classes))
    confusion = ranks.sum(confusion).cpu()
    iou = class_iou(confusion)
    accuracy = confusion.diagonal().sum().double() / confusion.sum()
    return Scores(
        float(iou.nanmean()), dict(zip(classes, iou.tolist(), strict=True)), float(accuracy), confusion
    )


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
    net = config.net
    model = build_model(net.model, num_classes, net.embed_dim, net.head, align_corners=net.align_corners)
    if not with_embed_head or config.loss.contrast == "off":
        drop_embed_head(model)
    try:
        load_weights(model, state["model"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}{_sister(net.model)}") from error
    return model.to(device).eval(), config, int(state["step"])


def _sister(name: str) -> str:
    """What to say of weights that do not fit a network of which there is another by a similar name."""
    others = [other for other in sisters(name) if other != name]
    return f"; with other heads there is also {', '.join(others)}: was it trained as that?" if others else ""


def export_model(checkpoint: Path, out: Path) -> int:
    """Write the model of a checkpoint as inference needs it, and return the number of its parameters.

    The file holds the state dict without projection head, the config and the step, and `load_model` reads it like a
    checkpoint. Raises the errors of `load_model`.
    """
    model, config, step = load_model(checkpoint, torch.device("cpu"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        torch.save({"step": step, "model": model.state_dict(), "config": flatten(config)}, file)
    return sum(weight.numel() for weight in model.parameters())
