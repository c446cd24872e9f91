"""Pictures of runs: training curves, predictions beside the truth, and t-SNE of pixel features.

All take several runs by name and show them side by side; one run is a dictionary of one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pixcontrast_ext.trainer.config import InferenceConfig
from pixcontrast_ext.trainer.data import IGNORE, DatasetSpec, Sample, stack, to_device
from pixcontrast_ext.trainer.inference import evaluating, predict
from pixcontrast_ext.trainer.logs import read_rows

_MOST_NAMED = 24
"""Classes that a legend has room for."""

_MOST_PIXELS = 4000
"""Pixels that t-SNE takes seconds for, not minutes."""

PixelFeatures = tuple[np.ndarray, np.ndarray]
"""Features [N, D] float32, unit length, and their classes [N]."""


def draw_run(
    model: nn.Module,
    dataset: Dataset[Sample],
    spec: DatasetSpec,
    out: Path,
    device: torch.device,
    *,
    amp: str = "off",
) -> list[Path]:
    """curves.png, panels.png, tsne.png and, of a run that has them, diagnostics.png in `out`/pictures.

    Returns their paths.
    """
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    clouds = {"features": pixel_features(model, dataset, device)}
    if model.embed_head is not None:
        clouds["embeddings"] = pixel_features(model, dataset, device, embeddings=True)
    paths = [
        draw_curves({out.name: out}, folder / "curves.png"),
        draw_panels({"prediction": model}, dataset, spec, folder / "panels.png", device, amp=amp),
        draw_tsne(clouds, spec, folder / "tsne.png"),
    ]
    if (out / "diagnostics.csv").exists():
        paths.append(draw_diagnostics(out, folder / "diagnostics.png"))
    return paths


def draw_curves(runs: dict[str, Path], path: Path) -> Path:
    """Training cross-entropy (faint: each row; strong: smoothed) and mIoU on val over steps, for all runs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss, miou = figure.subplots(1, 2)
    for number, (name, folder) in enumerate(runs.items()):
        rows = read_rows(folder / "train.csv")
        steps, values = [row["step"] for row in rows], np.array([row["cross_entropy"] for row in rows])
        loss.plot(steps, values, color=f"C{number}", alpha=0.25, linewidth=1)
        loss.plot(steps, _smooth(values), color=f"C{number}", label=name)
        rows = read_rows(folder / "val.csv")
        miou.plot(
            [row["step"] for row in rows], [row["miou"] for row in rows], "o-", color=f"C{number}", label=name
        )
    loss.set(title="Cross-entropy, training", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    miou.set(title="Mean IoU, validation", xlabel="step", ylabel="mIoU", ylim=(0, 1))
    for axes in (loss, miou):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
    return path


def draw_diagnostics(run: Path, path: Path) -> Path:
    """What a run's contrast found: loss beside chance and floor, cosines, gradients, anchors, positives and the bank.

    Of what there is for each class, the mean over classes, and of anchors and positives the fewest too, dashed.
    """
    rows = read_rows(run / "diagnostics.csv")
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = {
        "Contrast": ("contrast", "chance", "expected", "floor"),
        "Mean cosine of an anchor": ("positive_cosine", "negative_cosine"),
        "Contrast beside cross-entropy, on the features": ("gradient_ratio", "gradient_cosine"),
        "Shares": ("hard_share", "pixel_fill/", "region_fill/"),
        "Of a class: mean, and dashed the fewest": ("anchors/", "positives/"),
        "Share of the bank that a batch replaces": ("pixel_turnover/", "region_turnover/"),
    }
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for number, name in enumerate(names):
            columns = [
                each for each in rows[0] if each == name or (name[-1] == "/" and each.startswith(name))
            ]
            values = np.array([[row[column] for column in columns] for row in rows])
            if not columns or np.isnan(values).all():
                continue
            colour, label = f"C{number}", name.rstrip("/").replace("_", " ")
            axes.plot(steps, values.mean(1), "o-", color=colour, markersize=3, label=label)
            if name in ("anchors/", "positives/"):
                axes.plot(steps, values.min(1), "--", color=colour, linewidth=1)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        else:  # a run without a bank replaces nothing in it
            axes.set_axis_off()
            axes.set_title("")
    figure.savefig(path, dpi=110)
    return path


def draw_panels(
    models: dict[str, nn.Module],
    dataset: Dataset[Sample],
    spec: DatasetSpec,
    path: Path,
    device: torch.device,
    count: int = 4,
    options: InferenceConfig | None = None,
    amp: str = "off",
) -> Path:
    """A row per image, spread over the dataset: image | truth | prediction of each model. Void is black."""
    samples = spread(dataset, count)
    columns = ["image", "truth", *models]
    palette = colour_table(spec)
    height, width = samples[0][1].shape
    cell = 2.6
    figure = Figure(
        figsize=(cell * len(columns), cell * height / width * len(samples) + 1.2), layout="constrained"
    )
    grid = figure.subplots(len(samples), len(columns), squeeze=False)
    seen: set[int] = set()
    for row, sample in zip(grid, samples, strict=True):
        image, label = sample
        shown = [image.permute(1, 2, 0).numpy(), palette[label.numpy()]]
        for model in models.values():
            images, _ = to_device(stack([sample]), device)
            with evaluating(model):
                shown.append(palette[predict(model, images, label.shape, options, amp)[0].cpu().numpy()])
        for axes, picture in zip(row, shown, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
        seen |= set(label.unique().tolist())
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title)
    _class_legend(figure, spec, void=True, seen=seen)
    figure.savefig(path, dpi=110)
    return path


def colour_table(spec: DatasetSpec) -> np.ndarray:
    """Colour of each value of a label, [256, 3] uint8; black for what is no class."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(spec.colours)] = spec.colours
    return table


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path) -> Path:
    """Confusion matrix [C, C]: of the pixels of each class (row), the share predicted as each class (column).

    Numbers are percent, where there is room for them. Rows of classes without pixels stay empty.
    """
    from sklearn.metrics import ConfusionMatrixDisplay  # here: it takes seconds, --help should not

    counts = confusion.double()
    shares = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    named = len(classes) <= _MOST_NAMED
    side = 2.5 + max(4.0, (0.42 if named else 0.16) * len(classes))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(shares, display_labels=list(classes))
    display.plot(
        ax=axes, cmap="Blues", include_values=named, values_format=".0f", xticks_rotation="vertical",
        im_kw={"vmin": 0, "vmax": 100}, text_kw={"fontsize": 7}, colorbar=False,
    )  # fmt: skip
    for share, text in zip(shares.flat, display.text_.flat if named else (), strict=False):
        text.set_visible(share >= 0.5)  # zeros would hide the rest
    axes.tick_params(labelsize=None if named else 5)
    axes.set(xlabel="predicted", ylabel="truth")
    figure.colorbar(display.im_, ax=axes, label="% of the class's pixels", fraction=0.04)
    figure.savefig(path, dpi=110, bbox_inches="tight")  # long names would else push the axis' own out
    return path


def draw_tsne(clouds: dict[str, PixelFeatures], spec: DatasetSpec, path: Path) -> Path:
    """t-SNE of pixel features, coloured by true class, a panel for each cloud."""
    figure = Figure(figsize=(4.6 * len(clouds), 5.4), layout="constrained")
    grid = figure.subplots(1, len(clouds), squeeze=False)[0]
    for axes, (title, (features, labels)) in zip(grid, clouds.items(), strict=True):
        _scatter(axes, features, labels, spec)
        axes.set_title(f"{title}\n{len(labels)} pixels")
    seen = {int(label) for _, labels in clouds.values() for label in np.unique(labels)}
    _class_legend(figure, spec, void=False, seen=seen)
    figure.savefig(path, dpi=110)
    return path


def pixel_features(
    model: nn.Module,
    dataset: Dataset[Sample],
    device: torch.device,
    *,
    embeddings: bool = False,
    images: int = 32,
    per_class: int = 100,
) -> PixelFeatures:
    """Up to `per_class` pixels of each class from some images, up to `_MOST_PIXELS` in all, the same for every model.

    Features are what both heads read, so that runs with and without contrast compare; `embeddings` asks for
    the output of the projection head instead.
    """
    features, classes = [], []
    with evaluating(model):
        for sample in spread(dataset, images):
            batch, labels = to_device(stack([sample]), device)
            maps = model(batch)["embed"] if embeddings else model.backbone(batch)  # type: ignore[operator]
            picked = F.interpolate(labels[:, None].float(), maps.shape[-2:], mode="nearest").flatten()
            # The maps of all images would be gigabytes: an image gives no more than is asked for in all.
            chosen = _some_of_each(picked.long(), per_class)
            features.append(F.normalize(maps[0].flatten(1)[:, chosen].T.float(), dim=1).cpu())
            classes.append(picked[chosen].long().cpu())
    every, label = torch.cat(features), torch.cat(classes)
    chosen = _some(_some_of_each(label, per_class), _MOST_PIXELS)
    return every[chosen].numpy(), label[chosen].numpy()


def _some_of_each(label: Tensor, count: int) -> Tensor:
    """Indices of up to `count` of each class in labels [N], class by class."""
    places = [torch.nonzero(label == value)[:, 0] for value in label.unique() if value != IGNORE]
    return torch.cat([label.new_empty(0), *(_some(of_class, count) for of_class in places)])


def _some(indices: Tensor, count: int) -> Tensor:
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    return indices[order[:count].to(indices.device)]


def _scatter(axes: Axes, features: np.ndarray, labels: np.ndarray, spec: DatasetSpec) -> None:
    from sklearn.manifold import TSNE  # here: it takes seconds, --help should not

    perplexity = min(30.0, max(1.0, (len(features) - 1) / 3))
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features)
    colours = np.array(spec.colours)[labels] / 255
    axes.scatter(places[:, 0], places[:, 1], c=colours, s=9, linewidths=0)
    axes.set(xticks=[], yticks=[])


def _class_legend(
    figure: Figure, spec: DatasetSpec, *, void: bool, seen: Collection[int] | None = None
) -> None:
    """Names the classes; of more than `_MOST_NAMED` those that are `seen`, which have room."""
    named: Collection[int] = range(len(spec.classes))
    if seen is not None and len(named) > _MOST_NAMED:
        named = [label for label in named if label in seen][:_MOST_NAMED]
    handles: list[Patch | Line2D] = [
        Patch(facecolor=(red / 255, green / 255, blue / 255), label=name)
        for name, (red, green, blue) in ((spec.classes[label], spec.colours[label]) for label in named)
    ]
    if void:
        handles.append(Patch(facecolor="black", label="void"))
    columns = max(1, int(figure.get_figwidth() / 1.5))  # a column takes up to 1.5 inches
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a tenth of the values, without the bias of its start."""
    keep = 1 - 1 / max(1.0, len(values) / 10)
    smoothed, weight, total = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return np.array(smoothed)


def spread(dataset: Dataset[Sample], count: int) -> list[Sample]:
    """Up to `count` samples, spread evenly over a dataset."""
    length = len(dataset)  # type: ignore[arg-type]
    return [dataset[int(index)] for index in np.linspace(0, length - 1, min(count, length))]
