"""Noticing, without a wait for the device, that a class which occurs hardly ever yields an anchor."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pixcontrast_ext.ops import checks, handles, library
from pixcontrast_ext.ops.class_counts import count_per_image

BATCHES = 50  # that are looked at
OCCURS = 10  # images a class has to occur in for a word about it
SHARE = 0.1  # of these images: a class that may give anchors in fewer is named


class ClassWatch(handles.Handle):
    """Warns once, after the first `BATCHES` batches, of classes that almost no image has enough of; then it rests.

    Counts stay on the device. They come to the host by a copy that nobody waits for: the first call that finds it
    done reads it.
    """

    def __init__(self, num_classes: int, ignore_index: int, min_pixels: int) -> None:
        super().__init__()
        self.num_classes, self.ignore_index, self.min_pixels = num_classes, ignore_index, min_pixels
        self.batches, self.done = 0, False
        self.counts: Tensor | None = (
            None  # [2, C]: images that each class occurred in, those with enough pixels of it
        )
        self.copied: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "copied": None}  # an event cannot be copied

    def look(self, labels: Tensor) -> None:
        """Count a batch, or read what was counted."""
        if labels.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if self.batches < BATCHES:
            self._count(labels)
            self.batches += 1
            return
        assert self.counts is not None
        if self.copied is None:
            self.copied = self._copy(self.counts)
        counts, event = self.copied
        if event is None or event.query():
            self.done, self.counts, self.copied = True, None, None
            self._judge(counts, tuple(labels.shape[1:]))

    @staticmethod
    def _copy(counts: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if not counts.is_cuda:
            return counts.cpu(), None
        copied, event = counts.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record(torch.cuda.current_stream(counts.device))
        return copied, event

    def _count(self, labels: Tensor) -> None:
        if self.counts is None or self.counts.device != labels.device:
            self.counts = torch.zeros(2, self.num_classes, dtype=torch.int64, device=labels.device)
            self.batches = 0
        pixels = count_per_image(labels, self.num_classes, self.ignore_index)
        self.counts += torch.stack([pixels > 0, pixels >= max(1, self.min_pixels)]).sum(1)

    def _judge(self, counts: Tensor, size: tuple[int, ...]) -> None:
        rare = [
            f"{c} (in {enough} of {occurred})"
            for c, (occurred, enough) in enumerate(counts.T.tolist())
            if occurred >= OCCURS and enough < SHARE * occurred
        ]
        if rare:
            warnings.warn(
                f"of {self.num_classes} classes, these could give anchors in almost none of the images of the first "
                f"{self.batches} batches that they occurred in: {', '.join(rare)}. A class needs at least "
                f"min_pixels={self.min_pixels} pixels in an image, at the embeddings' size of {size[0]} x {size[1]}; "
                "with a smaller min_pixels it is contrasted.",
                stacklevel=2,
            )


def _watch_classes(labels: Tensor, anchor_labels: Tensor, watch: int, changed: str) -> Tensor:
    if changed:
        checks.refuse_recomputation(changed)
    found = handles.of(watch, ClassWatch)
    if not found.done:
        found.look(labels)
    return anchor_labels.clone()


def watch_classes(labels: Tensor, anchor_labels: Tensor, watch: ClassWatch, changed: str) -> Tensor:
    """Show the labels of a batch to `watch`. Returns the anchors' labels: go on with these.

    A compiled graph leaves out what has neither an effect nor a result that is used. There, this is also what refuses
    to be recomputed within a backward, if `changed` says what is no longer as it was.
    """
    if watch.done and not torch.compiler.is_compiling():
        return anchor_labels
    shown: Tensor = torch.ops.pixcontrast.watch_classes(labels, anchor_labels, watch.number, changed)
    return shown


library.register(
    "watch_classes(Tensor labels, Tensor anchor_labels, int watch, str changed) -> Tensor",
    _watch_classes,
    lambda labels, anchor_labels, watch, changed: torch.empty_like(anchor_labels),
)
