"""The contrast, beside any segmentation loss."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pixcontrast_ext import backends, diagnostics
from pixcontrast_ext.bank import MemoryBank
from pixcontrast_ext.batch import Batch, Keys, Outcome, checked_keys, zero_of
from pixcontrast_ext.maps import check_map, pick_classes, pick_confidence, pick_predictions, resize_nearest
from pixcontrast_ext.ops import checks, steering
from pixcontrast_ext.ops.autocast import product_dtype
from pixcontrast_ext.ops.gather import gather
from pixcontrast_ext.ops.infonce import check_temperature, contrast_rows, draw_and_contrast, mean_of
from pixcontrast_ext.ops.mining import Mining
from pixcontrast_ext.ops.priority import PriorityStream, draw_priority, same_draws
from pixcontrast_ext.ops.sampling import AnchorSample, SamplingRule, part_of_samples, sample, share_of
from pixcontrast_ext.ops.signature import INT32_MAX
from pixcontrast_ext.ops.watch import ClassWatch, watch_classes
from pixcontrast_ext.project import Candidates, Head, Source, draw_candidates, project
from pixcontrast_ext.settings import bank_for, head_for, mining_for


class PixelContrastLoss(nn.Module):
    """Pixel contrast of a batch against a memory bank, or within the batch (arXiv 2101.11939, section 3.2).

    Chooses anchors (`hard_anchor_sampling`), reads their embeddings (`gather_embeddings`) and contrasts them
    (`infonce`) with the bank, or with each other if there is none. Add it to any segmentation loss; beside
    cross-entropy `PixelContrastCrossEntropyLoss` does it.

    **Training and validation.** A call trains if the loss is in training mode and gradients are enabled: only such a
    call enqueues its batch, and counts for the warm-up. So validation under `torch.no_grad()` leaves bank and warm-up
    alone even if nobody called `eval()`, and no other rank waits for it; to fill a bank without gradients, call
    `bank.enqueue`. The value follows the same rule in both: within the warm-up it is zero in validation too, so that
    the curves can be compared.

    **Warm-up.** During the first `warmup_steps` calls that train no pair is contrasted: the loss is zero, whatever the
    embeddings hold, and so is their gradient, while the bank already fills. The count is the buffer `step`, on the
    device, and has no second home: however it is restored or broadcast, the next call goes by it. Calls are counted,
    not optimizer steps, of which a loss knows nothing: with gradient accumulation over n batches give n times as many.

    **Projecting only the pixels that are used.** With `head` the loss is given features in place of embeddings, and
    projects the anchors and the pixels that it draws for the bank: some thousand rows in place of B x H x W pixels, all
    together as one map. Gradient flows through the anchors alone. A class in an image gives the bank up to
    min(`region_views`, `bank_samples` // such classes) pixels: its region is their mean, and its pixels are those
    of them with the smallest priority. Batch norm sees these rows, with some repeated in place of padding. If no pixel
    has a label it sees zeros, and its running statistics stay as they were, as in a call that does not train.

    A head that is a module is a submodule of the loss: give its parameters to the optimizer. Where the model owns it,
    as `DistributedDataParallel` needs it to reduce its gradients, give a function around it, like
    `lambda features: model.head(features)`: nothing is registered, its mode is the model's, and its running statistics
    are updated whenever it is called in training mode, from zeros too. DDP reduces gradients wherever the head is
    called, but with `find_unused_parameters=True` it takes the head's parameters for unused, since no output of the
    model depends on them, and fails. With `SyncBatchNorm`, the zeros of a rank without labels count in all ranks'
    statistics.

    **Autocast.** Under `torch.autocast` the contrast multiplies in its dtype, whatever that of embeddings and bank, see
    `infonce`; the loss is in fp32. What is enqueued keeps the bank's dtype. A bank of another dtype is copied to that
    of the products in every call: `MemoryBank(dtype=)` avoids it.

    **Activation checkpointing** around the loss recomputes it within the backward, when the bank holds the batch
    already, the warm-up has counted the call, and a `generator` of its own draws anew: each raises an error. Without
    these three, checkpointing works.

    Args:
        num_classes: classes are 0 to num_classes - 1.
        weight: multiplies the loss; may be changed at any time.
        warmup_steps: see above.
        temperature: divides the cosine similarities.
        base_temperature: scales the loss by temperature / base_temperature; None does not scale it.
        max_samples, max_views, min_pixels: see `hard_anchor_sampling`. A class that occurs again and again and has
            `min_pixels` pixels in less than a tenth of its images is named in a warning, once, after 50 batches.
        hard_fraction, anchors: see `hard_anchor_sampling`. The fraction may be changed at any time.
        min_purity: in [0, 1]; a pixel of the embeddings' grid counts, as an anchor and for the bank, only if its label
            is at least this share of the full-size labels under it.
        max_samples_over: "rank": each rank takes `max_samples` anchors; "ranks": all ranks of the default process group
            together, of which each takes an equal part, and the first ones what is left over.
        ignore_index: label of pixels that do not count.
        bank: of the same class count; a submodule, so it is saved with the loss. Or settings from which one is made,
            as `dict(embed_dim=256, region_slots=2000)`: classes, `ignore_index` and `normalize` are the loss's.
        normalize: compare unit vectors.
        mining: which keys an anchor is contrasted with, a `Mining` or its settings or strategy; None means all. Drawn
            anew in every call, and ranked by cosine, which takes `normalize`.
        generator: for the draws of anchors and of the bank's pixels, so that they do not move torch's own; of the
            device of the labels. It is not part of the state dict. None means torch's own.
        head: see above; from features [1, C_in, N, 1] to embeddings [1, D, N, 1], each pixel by itself. Or the
            settings of a `ProjectionHead`.
        bank_samples, region_views: with a head, the most pixels that a call projects for the bank, of all classes in
            all images together and of one class in one image.
        backend: see `available_backends`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, at construction.
    """

    _version = 2
    step: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        weight: float = 1.0,
        warmup_steps: int = 0,
        temperature: float = 0.1,
        base_temperature: float | None = None,
        max_samples: int = 1024,
        max_views: int = 100,
        min_pixels: int | None = None,
        hard_fraction: float = 0.5,
        anchors: str = "hard",
        min_purity: float = 0.0,
        max_samples_over: str = "rank",
        ignore_index: int = 255,
        bank: MemoryBank | Mapping[str, Any] | None = None,
        normalize: bool = True,
        mining: Mining | Mapping[str, Any] | str | None = None,
        generator: torch.Generator | None = None,
        head: Head | Mapping[str, Any] | None = None,
        bank_samples: int = 4096,
        region_views: int = 64,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        counts = dict(num_classes=num_classes, max_samples=max_samples, bank_samples=bank_samples)
        checks.check_at_least(1, at_most=INT32_MAX, **counts)
        checks.check_at_least(1, max_views=max_views, region_views=region_views)
        head = head_for(head)
        checks.check_at_least(0, min_pixels=0 if min_pixels is None else min_pixels)
        steering.check_anchors(anchors)
        checks.check_share("min_purity", min_purity)
        if max_samples_over not in ("rank", "ranks"):
            raise ValueError(f"max_samples_over must be 'rank' or 'ranks', got {max_samples_over!r}")
        check_temperature("temperature", temperature)
        check_temperature("base_temperature", temperature if base_temperature is None else base_temperature)
        checks.check_ignore_index(ignore_index)
        checks.warn_of_class_255(ignore_index, num_classes)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        bank = bank_for(bank, num_classes=num_classes, ignore_index=ignore_index, normalize=normalize)
        mining = mining_for(mining, normalize=normalize)
        self.num_classes, self.warmup_steps, self.weight = num_classes, warmup_steps, weight
        self.temperature, self.base_temperature = temperature, base_temperature
        self.max_samples, self.max_views, self.min_pixels = max_samples, max_views, min_pixels
        self.hard_fraction, self.anchors, self.min_purity = hard_fraction, anchors, min_purity
        self.max_samples_over = max_samples_over
        self.ignore_index, self.normalize, self.backend = ignore_index, normalize, backend
        self.bank, self.mining = bank, mining
        self.head, self.bank_samples, self.region_views = head, bank_samples, region_views
        self._stream = None if generator is None else PriorityStream(generator)
        self._watch = ClassWatch(
            num_classes, ignore_index, max_views + 1 if min_pixels is None else min_pixels
        )
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._born_on_meta = self.step.is_meta  # as in MemoryBank

    @property
    def weight(self) -> float:
        """The factor of the contrast."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        checks.check_weight(value)
        self._weight = value

    @property
    def warmup_steps(self) -> int:
        """How many training calls do without contrast."""
        return self._warmup_steps

    @warmup_steps.setter
    def warmup_steps(self, value: int) -> None:
        checks.check_at_least(0, warmup_steps=value)
        self._warmup_steps = value

    @property
    def hard_fraction(self) -> float:
        """The share of the anchors that are hard."""
        return self._hard_fraction

    @hard_fraction.setter
    def hard_fraction(self, value: float) -> None:
        self._hard_fraction, self._hard_share = value, share_of(value)

    def extra_repr(self) -> str:
        """The settings shown by `print`."""
        return (
            f"{self.num_classes}, weight={self.weight}, warmup_steps={self.warmup_steps}, "
            f"temperature={self.temperature}, max_samples={self.max_samples}"
            + (f", mining={self.mining}" if self.mining else "")
        )

    def reset_parameters(self) -> None:
        """Begin the warm-up anew; the bank has a method of its own.

        FSDP, Lightning and others call a method of this name after `to_empty`.
        """
        nn.init.constant_(self.step, 0)  # which leaves alone what transformers has loaded
        self._born_on_meta = False

    @property
    def uninspected(self) -> bool:
        """Whether it was built on the meta device and nobody has said yet what is in its memory."""
        return self._born_on_meta

    def inspect(self) -> None:
        """If built on the meta device: begin the warm-up anew unless what it got for memory holds a count of it.

        Called automatically at the first use, and by `train` and `eval`.
        """
        if not self._born_on_meta or self.step.is_meta:
            return
        emptied = self.bank is not None and self.bank.inspect()  # one file left both out
        if emptied or not 0 <= int(self.step) < 2**31:
            self.reset_parameters()
        self._born_on_meta = False

    def train(self, mode: bool = True) -> PixelContrastLoss:
        """As that of a module, after `inspect`."""
        self.inspect()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PixelContrastLoss:
        was_meta = self.step.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.step.is_meta:  # to_empty
            self.reset_parameters()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        name = f"{prefix}step"
        if local_metadata.get("version") == 1:  # which had no warm-up
            state_dict.setdefault(name, self.step.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if name in state_dict and not self.step.is_meta:
            self._born_on_meta = False

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        predictions: Tensor | None,
        *,
        hard: Tensor | None = None,
        confidence: Tensor | None = None,
        keys_from: tuple[Tensor, ...] | None = None,
        return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar; a differentiable zero if nothing can be contrasted.

        Args:
            embeddings: [B, D, h, w], any strides; normalised here if `normalize`. With `head`: features
                [B, C_in, h, w].
            labels: [B, H, W], any integer dtype; picked at the nearest pixel if the size differs.
            predictions: predicted classes [B, H', W'], or logits [B, C, H', W']; likewise. With `hard` or
                anchors="random" they are not looked at and may be None.
            hard: [B, H', W'] bool, the pixels that are hard, in place of the mispredicted ones; resized likewise.
            confidence: [B, H', W'] floating point, in [0, inf), resized likewise. It steers the drawing of anchors and
                of the bank's pixels, see `hard_anchor_sampling`, and weights the mean: the loss is sum w_i loss_i /
                sum w_i over the anchors that have a positive, w_i the confidence there. No gradient reaches it.
            keys_from: (embeddings [B', D, h', w'], labels [B', H', W']), or a confidence [B', H', W'] as a third, of
                what the bank gets in place of this batch, as from a teacher: of any batch and size, without a gradient.
                `confidence` above is that of this batch and never applies to them; `min_purity` does.
            return_parts: return (loss, parts) for a log: a dict of detached scalars that stay on the device, "contrast"
                (before `weight`), "anchors" (how many) and, with a bank, "bank_fill" (share of its slots in use).

        Raises:
            TypeError, ValueError: shapes, dtypes or devices that do not fit; on the CPU also a label that is
                neither a class nor `ignore_index`, and a confidence that is negative or not finite; a head that gives
                anything but embeddings of its rows, of the bank's width.
            RuntimeError: activation checkpointing of what it does not fit, see above.
        """
        batch = self.prepare(embeddings, labels, predictions, hard, confidence, keys_from)
        outcome = self.take_step(batch)
        return (outcome.loss, self.parts(outcome)) if return_parts else outcome.loss

    def warm_up(
        self,
        embeddings: Tensor,
        labels: Tensor,
        predictions: Tensor | None = None,
        *,
        hard: Tensor | None = None,
        confidence: Tensor | None = None,
        keys_from: tuple[Tensor, ...] | None = None,
    ) -> None:
        """Compile and load all kernels that a training step on such tensors takes, InfoNCE and its gradient included.

        For those who cannot wait later, as within the capture of a CUDA graph. A step is taken on a copy of the
        embeddings; bank, warm-up, random numbers and a head that is a submodule are as before. Another head is called
        in the mode that it is in. In a distributed job every rank has to call it.

        Args:
            embeddings, labels, predictions, hard, confidence, keys_from: see `forward`; those that a step gets.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        if lazy := [name for name, each in self.named_buffers() if is_lazy(each)]:
            raise ValueError(f"{', '.join(lazy)} are made in the head's first call: call the loss before")
        before = {name: buffer.clone() for name, buffer in self.named_buffers()}
        modes = [(module, module.training) for module in self.modules()]
        watch, self._watch = self._watch, ClassWatch(self.num_classes, self.ignore_index, 0)
        try:
            with same_draws(self._stream, embeddings.device), torch.enable_grad():
                self.train()
                copy = embeddings.detach().clone().requires_grad_()
                loss = self(copy, labels, predictions, hard=hard, confidence=confidence, keys_from=keys_from)
                torch.autograd.grad(loss, copy)  # of the embeddings alone: none is left at a head's weights
        finally:
            self._watch = watch
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for name, buffer in self.named_buffers():
                    buffer.copy_(before[name])

    @torch.no_grad()
    def diagnostics(
        self,
        embeddings: Tensor,
        labels: Tensor,
        predictions: Tensor | None = None,
        *,
        hard: Tensor | None = None,
        confidence: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What the contrast finds in a batch: for a log, every hundred steps or so.

        Anchors are drawn and contrasted as in a step, in the warm-up too; nothing is enqueued or counted, and the next
        step draws what it would have drawn. Call it before the step, whose batch the bank should not hold yet. A head
        that is no submodule is called in the mode that it is in. "Positive" and "negative" are of all keys, also with
        `mining`. Scalars, NaN where there is nothing to take a mean of:

        - "contrast": the loss, before `weight`.
        - "chance": the loss if all cosines were equal, log(1 + negatives). An untrained network is near it; with mining
          by cosine, which keeps fewer and nearer negatives, on either side.
        - "expected": the loss if every cosine were the mean of its kind, "positive_cosine" or "negative_cosine".
        - "floor": the loss if each class were a point, and all were equally far from each other: the least that
          there is where classes have equally many anchors. Mining by cosine keeps fewer negatives, so it may be below.
        - "positive_cosine", "negative_cosine": the mean over the anchors of their mean cosine to positives, negatives.
        - "anchors", "contrasted": how many anchors, and how many of them have a positive and a negative.
        - "hard_share": the share of anchors that are mispredicted, or `hard`; NaN with anchors="random".

        Per class, [C]:

        - "anchors_of", "positives_of": how many anchors, how many keys.
        - With a bank "region_fill_of", "pixel_fill_of": the share of the slots in use.
        - "region_turnover_of", "pixel_turnover_of": rows that this rank's batch adds, as a share of the slots; one over
          its mean is the age in steps of a full ring's oldest keys.

        Args:
            embeddings, labels, predictions, hard, confidence: see `forward`.

        Returns:
            The values above by name, all on the device.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        batch = self.prepare(embeddings, labels, predictions, hard, confidence)
        with same_draws(self._stream, embeddings.device):
            source = self._chosen(batch)
            assert source.anchors is not None
            assert source.places is not None
            rows = gather(source.embeddings, source.places, self.normalize, torch.float32, source.backend)
            loss = self._mean(rows, source.anchors.labels, batch, source.anchors)
        return {"contrast": loss, **diagnostics.of_step(self, batch, source.anchors, rows)}

    def prepare(
        self,
        embeddings: Tensor,
        labels: Tensor,
        predictions: Tensor | None,
        hard: Tensor | None = None,
        confidence: Tensor | None = None,
        keys_from: tuple[Tensor, ...] | None = None,
    ) -> Batch:
        """All that a step checks, and its inputs at one size: for losses made of this one.

        Args:
            embeddings, labels, predictions, hard, confidence, keys_from: see `forward`.

        Raises:
            TypeError, ValueError, RuntimeError: as `forward`, which calls this first.
        """
        of = "embeddings" if self.head is None else "features"
        checks.check_embeddings(embeddings, of)
        if self._born_on_meta:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "the loss was built on the meta device and nobody said what is in its memory: call train(), eval() "
                    "or reset_parameters() before it is compiled"
                )
            self.inspect()
        if self.warmup_steps > 0 and self.step.device != embeddings.device:
            raise ValueError(
                f"{of} are on {embeddings.device}, the loss is on {self.step.device}: move it there with .to()"
            )
        if not isinstance(labels, Tensor) or not checks.is_integer(labels):
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels must be an integer tensor, got {got}")
        if self.head is None and self.bank is not None and embeddings.shape[1] != self.bank.embed_dim:
            raise ValueError(
                f"embeddings {tuple(embeddings.shape)} do not fit the bank, which is {self.bank.embed_dim} wide"
            )
        check_map("labels", labels, 3, embeddings, of)
        size = (embeddings.shape[2], embeddings.shape[3])
        labels = pick_classes(labels, size, self.min_purity, self.num_classes, self.ignore_index)
        if confidence is not None:
            confidence = pick_confidence("confidence", confidence, embeddings, of)
            labels = steering.only_drawn(labels, confidence, self.ignore_index)
        if hard is not None:
            steering.check_hard(hard, None, embeddings.device)
            check_map("hard", hard, 3, embeddings, of)
            hard = resize_nearest(hard, size)
        if hard is not None or self.anchors == "random":
            predictions = steering.predictions_for(labels, None, hard, self.anchors)
        else:
            predictions = pick_predictions(predictions, self.num_classes, embeddings, of)
        keys = (
            None
            if keys_from is None
            else checked_keys(keys_from, self.bank, self.min_purity, self.ignore_index)
        )
        batch = Batch(embeddings, labels, predictions, confidence, keys)
        if self.bank is not None and (self._weight > 0 or self._trains()):
            self.bank.check_device(embeddings.device, of)
        return batch

    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def take_step(self, batch: Batch) -> Outcome:
        """A whole call on what `prepare` has checked: contrast, and in training the bank and the warm-up go on."""
        trains = self._trains()
        changed = self._changed() if trains else ""
        if changed and not torch.compiler.is_compiling():
            checks.refuse_recomputation(changed)
        source, candidates = Source(batch.embeddings), None
        if self._weight > 0 or (trains and (self.bank is not None or self.head is not None)):
            backend = self._backend_of_maps(batch.embeddings)
            if self.head is None:
                anchors = self._anchors(batch, backend) if self._weight > 0 else None
                places = None if anchors is None else anchors.indices
                source = Source(batch.embeddings, backend, anchors, places)
            else:
                source, candidates = self._project(self.head, batch, trains, backend)
        if self._weight > 0:
            unweighted, anchor_labels = self._contrast(batch, source, trains, changed)
            loss = self._weight * unweighted
        else:
            loss = unweighted = zero_of(batch.embeddings) + zero_of(source.embeddings)  # the head's, too
            anchor_labels = batch.labels.new_empty(0)
        if trains:
            if self.bank is not None:
                self._enqueue(self.bank, batch, source, candidates)
            if self.warmup_steps > 0:
                self.step.add_(self.step < self.warmup_steps)
        return Outcome(loss, unweighted, anchor_labels)

    def parts(self, outcome: Outcome) -> dict[str, Tensor]:
        """The parts of a step that `forward(..., return_parts=True)` returns."""
        parts = {"contrast": outcome.contrast.detach(), "anchors": (outcome.anchor_labels >= 0).sum()}
        if self.bank is not None:
            filled = self.bank.region_fill.sum() + self.bank.pixel_fill.sum()
            parts["bank_fill"] = filled / self.bank.key_labels.numel()
        return parts

    def _backend_of_maps(self, embeddings: Tensor) -> str:
        """That of sampling, gather and the bank, which serve alike."""
        of_bank = None if self.bank is None else self.bank.keys.dtype
        dtype = torch.float64 if of_bank == torch.float64 else embeddings.dtype
        return backends.resolve(self.backend, "enqueue_collect", embeddings.device, dtype)

    def _changed(self) -> str:
        """Why a training call cannot be repeated: the state that it has changed, or "" if there is none."""
        if self.bank is not None:
            return "the bank already holds this batch"
        if self.warmup_steps > 0:
            return "its warm-up has counted this call"
        return "its generator draws anew" if self._stream is not None else ""

    def _draw(self, labels: Tensor) -> Tensor:
        return draw_priority(labels) if self._stream is None else self._stream.draw(labels)

    def _priority(self, labels: Tensor, confidence: Tensor | None) -> Tensor:
        priority = self._draw(labels)
        return priority if confidence is None else steering.weigh_priority(priority, confidence)

    def _anchors(self, batch: Batch, backend: str) -> AnchorSample:
        min_pixels = self.max_views + 1 if self.min_pixels is None else self.min_pixels
        max_samples = (
            self.max_samples if self.max_samples_over == "rank" else part_of_samples(self.max_samples)
        )
        rule = SamplingRule(
            self.num_classes, max_samples, self.max_views, min_pixels, self.ignore_index, self._hard_share
        )
        priority = self._priority(batch.labels, batch.confidence)
        return sample(batch.labels, batch.predictions, priority, rule, backend)

    def _chosen(self, batch: Batch) -> Source:
        """The anchors of a call that does not train."""
        backend = self._backend_of_maps(batch.embeddings)
        if self.head is not None:
            return self._project(self.head, batch, False, backend)[0]
        anchors = self._anchors(batch, backend)
        return Source(batch.embeddings, backend, anchors, anchors.indices)

    def _project(
        self, head: Head, batch: Batch, trains: bool, backend: str
    ) -> tuple[Source, Candidates | None]:
        """Draw the pixels that this step uses, anchors and then candidates for the bank, and project these alone."""
        features, labels = batch.embeddings, batch.labels
        draws = trains and self.bank is not None and batch.keys is None
        # In every call that trains something is projected: `DistributedDataParallel` demands a gradient of the head.
        anchors = self._anchors(batch, backend) if self._weight > 0 or not draws else None
        candidates = None
        if draws:
            rule = SamplingRule(
                self.num_classes, self.bank_samples, self.region_views, 1, self.ignore_index, self._hard_share
            )
            candidates = draw_candidates(labels, self._priority(labels, batch.confidence), rule, backend)
        drawn = None if candidates is None else candidates.pixels
        embeddings = project(head, features, anchors, drawn, trains, backend)
        if self.bank is not None:
            self.bank.check(embeddings, "embeddings of the head")
        places = None
        if anchors is not None:
            places = torch.arange(anchors.indices.shape[0], device=features.device)
        return Source(embeddings, self._backend_of_maps(embeddings), anchors, places), candidates

    def _enqueue(self, bank: MemoryBank, batch: Batch, source: Source, drawn: Candidates | None) -> None:
        if drawn is not None:
            rows = source.embeddings[:, :, -drawn.groups.shape[0] :]
            bank.append_drawn(rows, drawn.groups, drawn.priority, drawn.images, source.backend)
            return
        keys: Batch | Keys = batch
        backend = source.backend
        if batch.keys is not None:
            keys, backend = batch.keys, self._backend_of_maps(batch.keys.embeddings)
        bank.append(keys.embeddings, keys.labels, self._priority(keys.labels, keys.confidence), backend)

    def _contrast(self, batch: Batch, source: Source, trains: bool, changed: str) -> tuple[Tensor, Tensor]:
        """The loss before its weight, and the labels of the anchors."""
        embeddings, backend, anchors, places = source
        assert anchors is not None
        assert places is not None
        anchor_labels = anchors.labels
        if trains:
            anchor_labels = watch_classes(batch.labels, anchor_labels, self._watch, changed)
        if self.warmup_steps > 0:
            # Rows without a label take no part, whatever they hold. Decided on the device: nothing waits to know, a
            # graph is good for the warm-up and for what follows, and the embeddings get their gradient of zero.
            anchor_labels = torch.where(self.step < self.warmup_steps, -1, anchor_labels)
        dtype = product_dtype(embeddings if self.bank is None else self.bank.keys)
        rows = gather(embeddings, places, self.normalize, dtype, backend)
        return self._mean(rows, anchor_labels, batch, anchors), anchor_labels

    def _mean(self, rows: Tensor, anchor_labels: Tensor, batch: Batch, anchors: AnchorSample) -> Tensor:
        """The loss of the anchors' rows, before its weight."""
        weights = None
        if batch.confidence is not None and batch.confidence.numel() > 0:
            weights = batch.confidence.flatten()[anchors.indices]
        loss = mean_of(*self._loss_of(rows, anchor_labels), weights)
        return loss * self.scale

    @property
    def scale(self) -> float:
        """By what the loss is scaled: temperature / base_temperature, or 1."""
        return 1.0 if self.base_temperature is None else self.temperature / self.base_temperature

    def _loss_of(self, anchors: Tensor, anchor_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [A] and |P| [A] of anchors against the bank, or each other."""
        others = None
        if self.bank is not None:
            keys, key_labels = self.bank.flat()
            others = keys.to(anchors.dtype), key_labels  # which is theirs, except under autocast
        exclude_self, temperature = others is None, float(self.temperature)
        # Backends differ in the widths and dtypes of rows that they contrast.
        width, op = operator.index(anchors.shape[1]), "infonce" if self.mining is None else "mining"
        backend = backends.resolve(self.backend, op, anchors.device, anchors.dtype, width)
        if self.mining is None:
            return contrast_rows(anchors, anchor_labels, others, temperature, exclude_self, backend)
        of_class = None if self.bank is None else self.bank.region_slots + self.bank.pixel_slots
        return draw_and_contrast(
            anchors, anchor_labels, others, self.mining, self._draw, of_class, temperature, backend
        )
