"""What a trained network's pixel features are worth, apart from its classifier.

The contrast shapes the features, and a classifier that gives rare classes nothing can hide that from the mIoU. So
pixels of a split, of each class up to the same number, are told apart by pixels of the training images: by the
nearest ones, by class means and by a linear classifier that weighs classes alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from pixcontrast_ext.trainer.config import DataConfig, TrainConfig, flatten
from pixcontrast_ext.trainer.data import IGNORE, DatasetSpec, Sample, dataset_spec, stack, to_device
from pixcontrast_ext.trainer.distributed import join_ranks
from pixcontrast_ext.trainer.evaluate import load_model
from pixcontrast_ext.trainer.files import write_json
from pixcontrast_ext.trainer.inference import evaluating
from pixcontrast_ext.trainer.pictures import draw_tsne

log = logging.getLogger(__name__)

_BLOCK = 512
"""Queries that are compared with the gallery at a time: what that takes is some thirty bytes a pair."""
NEIGHBOURS = 20
"""That vote in the k-NN score."""


@dataclass(frozen=True)
class ProbeConfig:
    """What to probe, and with how many pixels."""

    root: Path | None = None
    """Folder of the dataset, if not where it was in training."""
    split: str = "val"
    """Split whose pixels are to be told apart."""
    queries: int = 200
    """Pixels of each class from that split, at most."""
    gallery: int = 400
    """Pixels of each class from the training images, at most."""
    images: int = 120
    """Images of each of the two that pixels are drawn from, spread over it."""
    seed: int = 0
    """Of the choice of pixels, and of the control's permutation."""
    device: str = "auto"
    """cuda, cpu, or auto for cuda where there is one."""
    out: Path | None = None
    """Folder for the scores (JSON) and pictures; only printed unless given."""

    def validate(self) -> None:
        """Raises ValueError that names the first option out of range and its value."""
        for name in ("queries", "gallery", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}, must not be negative")


@dataclass(frozen=True)
class Pixels:
    """Rows of pixels, of unit length, and what they are."""

    rows: dict[str, np.ndarray]
    """Of "features" and, where there is a projection head, "embeddings": [N, D] float32."""
    labels: np.ndarray
    """[N] int64."""


@dataclass(frozen=True)
class ProbeScores:
    """Of one kind of rows. Every mean is over classes first, so that all count alike."""

    own_cosine: float
    """Mean cosine of a pixel to its class's mean."""
    other_cosine: float
    """Mean cosine of a pixel to the nearest mean of another class."""
    between_cosine: float
    """Mean cosine of two classes' means."""
    recall_at_1: float
    """Share of pixels whose nearest training pixel is of their class."""
    map_at_r: float
    """Mean average precision at R, R being the training pixels of the class (Musgrave et al., arXiv 2003.08505)."""
    knn: float
    """Balanced accuracy of a vote among the nearest training pixels."""
    linear: float
    """Balanced accuracy of a logistic regression that weighs classes alike."""
    control: float
    """That of a regression to permuted training labels: around chance, and further from it where features lie in tight
    clusters, each of which goes to one class as a whole."""
    class_recall: dict[str, float]
    """Of the logistic regression."""


@dataclass(frozen=True)
class Probe:
    """The scores of one run."""

    step: int
    classes: tuple[str, ...]
    """Those with pixels in both splits."""
    scores: dict[str, ProbeScores]
    """Of "features" and, where there is a projection head, "embeddings"."""


def take_pixels(
    model: nn.Module,
    dataset: Dataset[Sample],
    device: torch.device,
    *,
    per_class: int,
    images: int,
    seed: int,
) -> Pixels:
    """Up to `per_class` pixels of each class, the same for every model of one stride.

    An image gives up to four times its even share, so a class that few images show is not left short.
    """
    length = len(dataset)  # type: ignore[arg-type]
    images = min(images, length)
    rng = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {}
    labels: list[np.ndarray] = []
    with evaluating(model):
        chosen = np.linspace(0, length - 1, images).astype(int)
        for index in tqdm(chosen, desc="reading pixels", unit="image", leave=False, disable=None):
            batch, label = to_device(stack([dataset[int(index)]]), device)
            maps = {"features": model.backbone(batch)}  # type: ignore[operator]
            if model.embed_head is not None:
                maps["embeddings"] = model.embed_head(maps["features"])  # type: ignore[operator]
            size = maps["features"].shape[-2:]
            picked = (
                F.interpolate(label[:, None].float(), size, mode="nearest").long().flatten().cpu().numpy()
            )
            places = some_of_each(picked, -(-4 * per_class // images), rng)
            labels.append(picked[places])
            for name, each in maps.items():
                rows = each[0].flatten(1)[:, torch.from_numpy(places).to(device)].T
                found.setdefault(name, []).append(F.normalize(rows.float(), dim=1).cpu().numpy())
    every = np.concatenate(labels)
    kept = some_of_each(every, per_class, rng)
    return Pixels({name: np.concatenate(rows)[kept] for name, rows in found.items()}, every[kept])


def some_of_each(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of up to `count` of each class in labels [N], drawn at random, class by class."""
    classes = [value for value in np.unique(labels) if value != IGNORE]
    places = [rng.permutation(np.flatnonzero(labels == value))[:count] for value in classes]
    return np.concatenate([np.zeros(0, np.int64), *places])


def score(
    gallery: np.ndarray,  # [N, D] unit rows
    of_gallery: np.ndarray,  # [N] classes
    queries: np.ndarray,  # [M, D] unit rows
    of_queries: np.ndarray,  # [M] classes, all of which the gallery has
    names: Sequence[str],
    seed: int = 0,
) -> ProbeScores:
    """How well queries are told apart by a gallery."""
    classes = np.unique(of_queries)

    def over_classes(values: np.ndarray) -> float:
        return float(np.mean([values[of_queries == value].mean() for value in classes]))

    known = np.unique(of_gallery)
    means = np.stack([gallery[of_gallery == value].mean(0) for value in known])
    means /= np.linalg.norm(means, axis=1, keepdims=True).clip(1e-12)
    to_means, own = queries @ means.T, of_queries[:, None] == known
    between = (means @ means.T)[~np.eye(len(known), dtype=bool)]

    blocks = [slice(at, at + _BLOCK) for at in range(0, len(queries), _BLOCK)]
    retrieved = [_retrieve(gallery, of_gallery, queries[b], of_queries[b], known) for b in blocks]
    nearest, average, votes = (np.concatenate(parts) for parts in zip(*retrieved, strict=True))
    guessed = fit_linear(gallery, of_gallery)(queries)
    permuted = np.random.default_rng(seed).permutation(of_gallery)
    return ProbeScores(
        own_cosine=over_classes(to_means[own]),
        other_cosine=over_classes(np.where(own, -np.inf, to_means).max(1))
        if len(known) > 1
        else float("nan"),
        between_cosine=float(between.mean()) if len(between) else float("nan"),
        recall_at_1=over_classes(nearest),
        map_at_r=over_classes(average),
        knn=over_classes(known[votes.argmax(1)] == of_queries),
        linear=over_classes(guessed == of_queries),
        control=over_classes(fit_linear(gallery, permuted)(queries) == of_queries),
        class_recall={
            names[value]: float((guessed == value)[of_queries == value].mean()) for value in classes
        },
    )


def _retrieve(
    gallery: np.ndarray,  # [N, D]
    of_gallery: np.ndarray,  # [N]
    queries: np.ndarray,  # [B, D]
    of_queries: np.ndarray,  # [B]
    known: np.ndarray,  # [C] classes
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each query, whether the nearest is of its class, its average precision at R [B], and the votes [B, C]."""
    order = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")
    hits = of_gallery[order] == of_queries[:, None]
    places = np.arange(1, len(of_gallery) + 1)
    relevant = hits.sum(1)
    within = places[None] <= relevant[:, None]
    precision = hits.cumsum(1) / places
    average = (precision * hits * within).sum(1) / relevant.clip(1)
    votes = np.stack([(of_gallery[order[:, :NEIGHBOURS]] == value).sum(1) for value in known], 1)
    return hits[:, 0], average, votes


def fit_linear(rows: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A logistic regression on standardised rows, classes weighed alike. Of one class it knows no other."""
    from sklearn.linear_model import LogisticRegression  # here: it takes seconds, --help should not
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) < 2:
        return lambda queries: np.full(len(queries), labels[0])
    classifier = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000, C=0.1)
    )
    predict: Callable[[np.ndarray], np.ndarray] = classifier.fit(rows, labels).predict
    return predict


_PIXELS_OF = ("size", "scale", "short_side", "train_splits", "train_fraction")
_SCENES_OF = ("data_seed", "synthetic_images")
"""Options that say which pixels a run is scored with; the second, of generated scenes only."""


def probe(runs: Sequence[Path], config: ProbeConfig) -> dict[str, Probe]:
    """Probe the newest checkpoint of each run, and leave probe.json, probe.png and probe-tsne.png in `config.out`.

    Args:
        runs: folders of runs, or checkpoints, all of one dataset.
        config: see `ProbeConfig`.

    Raises:
        ValueError: an option out of range, runs of several datasets, two of one name, a split that one was trained on,
            or one without a class that the training images have.
        CheckpointError: a run without a whole checkpoint.
    """
    config.validate()
    names = [_name(run) for run in runs]
    if not runs or len(set(names)) < len(names):
        given = ", ".join(map(str, runs)) or "none"
        raise ValueError(f"the runs are {given}, must be at least one, and no two of one name")
    probes: dict[str, Probe] = {}
    clouds: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    first: TrainConfig | None = None
    with join_ranks(config.device) as ranks:
        for name, run in zip(names, runs, strict=True):
            model, trained, step = load_model(run, ranks.device, with_embed_head=True)
            first = first or trained
            if trained.data.dataset != first.data.dataset:
                raise ValueError(f"{runs[0]} is of {first.data.dataset}, {run} of {trained.data.dataset}")
            if config.split in trained.data.train_splits:
                raise ValueError(f"--split is {config.split!r}, which {run} was trained on")
            chosen, of_first = flatten(trained.data), flatten(first.data)
            options = _PIXELS_OF + (_SCENES_OF if first.data.dataset == "synthetic" else ())
            unlike = [each for each in options if chosen[each] != of_first[each]]
            if unlike:
                told = ", ".join(f"--{each.replace('_', '-')} {chosen[each]}" for each in unlike)
                log.warning(
                    "%s is scored with other pixels than %s: it was trained with %s", run, runs[0], told
                )
            data = replace(trained.data, root=config.root or trained.data.root)
            probes[name], queries = probe_model(model, data, config, ranks.device, step)
            clouds[name] = queries.rows["features"], queries.labels
    assert first is not None
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        record = {name: asdict(each) for name, each in probes.items()}
        write_json(config.out / "probe.json", {**flatten(config), "runs": record})
        draw_probes(probes, config.out / "probe.png")
        draw_tsne(clouds, dataset_spec(first.data.dataset), config.out / "probe-tsne.png")
    return probes


def _name(run: Path) -> str:
    """That of a run's folder, with the file's for a checkpoint."""
    if run.is_dir():
        return run.name
    folder = run.parent.parent if run.parent.name == "checkpoints" else run.parent
    return f"{folder.name}/{run.name}"


def probe_model(
    model: nn.Module, data: DataConfig, config: ProbeConfig, device: torch.device, step: int
) -> tuple[Probe, Pixels]:
    """The scores of one model, and the pixels that were told apart."""
    spec = dataset_spec(data.dataset)
    gallery, queries = (
        take_pixels(
            model,
            pixels,
            device,
            per_class=per_class,
            images=config.images,
            seed=config.seed,
        )
        for pixels, per_class in (
            (spec.training_set(data), config.gallery),
            (spec.build(data, config.split), config.queries),
        )
    )
    return probe_pixels(gallery, queries, spec, step, config.seed), queries


def probe_pixels(gallery: Pixels, queries: Pixels, spec: DatasetSpec, step: int, seed: int) -> Probe:
    """The scores of the classes that both have. Raises ValueError if there is none."""
    common = np.intersect1d(gallery.labels, queries.labels)
    if not len(common):
        raise ValueError("no class has labelled pixels both in the training images and in the split")
    trained, asked = np.isin(gallery.labels, common), np.isin(queries.labels, common)
    scores = {
        kind: score(
            rows[trained],
            gallery.labels[trained],
            queries.rows[kind][asked],
            queries.labels[asked],
            spec.classes,
            seed,
        )
        for kind, rows in gallery.rows.items()
    }
    return Probe(step, tuple(spec.classes[value] for value in common), scores)


MEASURES = {
    "own_cosine": "cosine to own class mean",
    "other_cosine": "  to nearest other",
    "between_cosine": "  between class means",
    "recall_at_1": "R@1",
    "map_at_r": "mAP@R",
    "knn": f"{NEIGHBOURS}-NN",
    "linear": "linear probe",
    "control": "  labels permuted",
}


def table(probes: dict[str, Probe]) -> str:
    """The scores as a table, a column per run; features first, then embeddings where there are some."""
    rows = [["", *probes]]
    for kind in ("features", "embeddings"):
        found = [each.scores.get(kind) for each in probes.values()]
        if not any(found):
            continue
        rows.append([kind, *("" for _ in found)])
        for measure, title in MEASURES.items():
            values = (f"{getattr(of_run, measure):.3f}" if of_run else "-" for of_run in found)
            rows.append([f"  {title}", *values])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    classes = next(iter(probes.values())).classes
    lines.append(
        f"Balanced over {len(classes)} classes: by chance R@1, k-NN and the linear probe are {1 / len(classes):.3f}."
    )
    return "\n".join(line.rstrip() for line in lines)


def draw_probes(probes: dict[str, Probe], path: Path) -> Path:
    """Scores of the features of all runs, and the recall of each class by the linear probe."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    scores, recalls = figure.subplots(1, 2, width_ratios=(2, 3))
    measures = ("recall_at_1", "map_at_r", "knn", "linear")
    names = sorted({name for each in probes.values() for name in each.scores["features"].class_recall})
    width = 0.8 / len(probes)
    for number, (run, each) in enumerate(probes.items()):
        of_features: Any = each.scores["features"]
        shift = (number - (len(probes) - 1) / 2) * width
        values = [getattr(of_features, measure) for measure in measures]
        scores.bar(np.arange(len(measures)) + shift, values, width, label=run)
        recall = [of_features.class_recall.get(name, np.nan) for name in names]
        recalls.bar(np.arange(len(names)) + shift, recall, width)
    scores.set_xticks(range(len(measures)), [MEASURES[measure] for measure in measures])
    scores.set(title="Features of pixels, classes weighed alike", ylim=(0, 1))
    recalls.set_xticks(range(len(names)), names, rotation=90 if len(names) > 6 else 0)
    recalls.set(title="Recall of each class by the linear probe", ylim=(0, 1))
    for axes in (scores, recalls):
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=min(4, len(probes)), frameon=False)
    figure.savefig(path, dpi=110)
    return path
