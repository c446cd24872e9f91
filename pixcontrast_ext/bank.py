"""The memory bank: region and pixel embeddings of the whole training set, in one ring each per class."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pixcontrast_ext import backends
from pixcontrast_ext.maps import check_map, pick_classes, resize_nearest
from pixcontrast_ext.ops import checks, enqueue, steering
from pixcontrast_ext.ops.exchange import Exchange
from pixcontrast_ext.ops.priority import check_priority, draw_priority
from pixcontrast_ext.ops.signature import FLOATING

_UNIT = 1e-2
"""How far a stored unit vector's norm may be from 1: more than bf16 rounds, less than an average takes away."""


class MemoryBank(nn.Module):
    """Per class a ring of region embeddings and a ring of pixel embeddings (arXiv 2101.11939, section 3.3).

    A region is the mean embedding of one class in one image. The state is buffers only, so the bank moves,
    saves and loads with the model that holds it:

        keys          [C, R + P, D]  regions first; zeros until filled
        key_labels    [C, R + P]     int32, -1 until filled
        region_ptr, region_fill, pixel_ptr, pixel_fill  [C] int64: next slot to write, and slots in use

    In a distributed job every rank must call `enqueue` at every step, with a batch of any size, also none, and several
    banks in the same order; candidates are exchanged in rank order and all banks stay bit-identical. A rank that leaves
    a step out keeps the others waiting until the process group's time limit. If it calls again at the next step, its
    rows join the wrong step, and the others wait at the end, one call ahead. With PIXCONTRAST_RANK_TIMEOUT=20 in the
    environment a rank that is more than 20 seconds late ends the job, with an error that names it. Keep the bank
    outside of `DistributedDataParallel`, which would send all of it to all ranks in every forward, where all have it
    already.

    Keep the bank out of averages of weights (EMA) as well: the mean of what a slot held at different times is the
    embedding of no pixel. Rows that were averaged come back to unit norm when such a state is loaded, with a warning; a
    state whose pointers and labels were averaged too is refused.

    A bank that was built on the meta device is empty once it has memory: after `to_empty`, and also where a loader
    (transformers' `from_pretrained`) materialises it and finds no bank in its file.

    Args:
        num_classes: C.
        embed_dim: D.
        region_slots, pixel_slots: R and P; either may be 0.
        pixels_per_image: the most pixels that one class of one image adds.
        dtype: of the keys, fp32, fp16 or bf16 (fp64 on the reference backend), or its name, as "bfloat16".
        ignore_index: label of pixels that do not count.
        normalize: store unit vectors, regions as means of unit vectors; otherwise everything as it comes.
        process_group: "default" for all ranks of an initialised job, a group, or None to keep to this rank.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, at construction.
    """

    keys: Tensor
    key_labels: Tensor
    region_ptr: Tensor
    region_fill: Tensor
    pixel_ptr: Tensor
    pixel_fill: Tensor

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        *,
        region_slots: int = 5000,
        pixel_slots: int = 5000,
        pixels_per_image: int = 10,
        dtype: torch.dtype | str = torch.float32,
        ignore_index: int = 255,
        normalize: bool = True,
        process_group: dist.ProcessGroup | str | None = "default",
    ) -> None:
        super().__init__()
        checks.check_at_least(1, num_classes=num_classes, embed_dim=embed_dim)
        checks.check_at_least(
            0, region_slots=region_slots, pixel_slots=pixel_slots, pixels_per_image=pixels_per_image
        )
        if isinstance(dtype, str):
            named, dtype = dtype, getattr(torch, dtype.removeprefix("torch."), dtype)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"dtype must be the name of one, as 'bfloat16', got {named!r}")
        if dtype not in FLOATING:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype!r}; one of {FLOATING}")
        checks.check_ignore_index(ignore_index)
        outside: Any = dist.GroupMember.NON_GROUP_MEMBER
        if process_group == outside:  # what new_group gives the ranks outside of it
            process_group = None
        if process_group not in ("default", None) and not isinstance(process_group, dist.ProcessGroup):
            raise ValueError(f"process_group must be 'default', a group or None, got {process_group!r}")
        self.num_classes, self.embed_dim = num_classes, embed_dim
        self.region_slots, self.pixel_slots = region_slots, pixel_slots
        self.pixels_per_image, self.ignore_index, self.normalize = pixels_per_image, ignore_index, normalize
        self._exchange = Exchange(process_group)
        slots = region_slots + pixel_slots
        self.register_buffer("keys", torch.zeros(num_classes, slots, embed_dim, dtype=dtype))
        self.register_buffer("key_labels", torch.full((num_classes, slots), -1, dtype=torch.int32))
        for name in ("region_ptr", "region_fill", "pixel_ptr", "pixel_fill"):
            self.register_buffer(name, torch.zeros(num_classes, dtype=torch.int64))
        # Whoever gives it memory fills that, or calls what follows; `inspect` looks whether somebody did.
        self._born_on_meta = self.keys.is_meta

    def extra_repr(self) -> str:
        """What is printed of it."""
        return (
            f"{self.num_classes}, {self.embed_dim}, region_slots={self.region_slots}, pixel_slots={self.pixel_slots}, "
            f"pixels_per_image={self.pixels_per_image}, dtype={self.keys.dtype}"
        )

    def flat(self) -> tuple[Tensor, Tensor]:
        """The keys [K, D] and their labels [K] as views, K = C (R + P).

        Raises:
            ValueError: if the keys require grad.
        """
        self._check_usable()
        return self.keys.view(-1, self.embed_dim), self.key_labels.view(-1)

    def check(self, embeddings: Tensor, name: str = "embeddings") -> None:
        """Raise ValueError unless the bank takes this [B, D, H, W] map as it is now."""
        if embeddings.shape[1] != self.embed_dim:
            raise ValueError(f"{name} must be {self.embed_dim} wide, got {tuple(embeddings.shape)}")
        self.check_device(embeddings.device, name)

    def check_device(self, device: torch.device, name: str) -> None:
        """Raise ValueError unless the bank takes something on this device as it is now."""
        if device != self.keys.device:
            raise ValueError(f"{name} must be on the bank's device {self.keys.device}, got {device}")
        self._check_usable()

    def _check_usable(self) -> None:
        if self._born_on_meta:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "the bank was built on the meta device and nobody said what is in its memory: call train(), eval() "
                    "or reset_parameters() before it is compiled"
                )
            self.inspect()
        if self.keys.requires_grad:
            raise ValueError(
                "the bank's keys must not require grad: they are written between forward and backward"
            )

    def reset(self) -> None:
        """Forget everything."""
        with torch.no_grad():
            for buffer in self.buffers():
                buffer.fill_(-1 if buffer is self.key_labels else 0)
        self._born_on_meta = False

    def reset_parameters(self) -> None:
        """Empty a bank whose memory holds nothing yet.

        FSDP, Lightning and others call a method of this name after `to_empty`. What transformers has loaded from a
        file stays as it is, if its `_init_weights` calls this.
        """
        # While transformers loads a model, its `nn.init.*` leave alone what came from the file.
        for buffer in self.buffers():
            nn.init.constant_(buffer, -1 if buffer is self.key_labels else 0)
        self._born_on_meta = False

    def inspect(self) -> bool:
        """Of a bank that was built on the meta device: whether what it got for memory holds no bank.

        Then it is emptied, with a warning. Called by itself at the first use, and by `train` and `eval`.
        """
        if not self._born_on_meta or self.keys.is_meta:
            return False
        self._born_on_meta = False
        problems = self._problems(dict(self.named_buffers()), "")
        if problems:
            self.reset()
            warnings.warn(
                "a memory bank was built on the meta device and what loaded it left out its buffers; it starts empty. "
                f"Call its reset_parameters() to say so yourself. What was there: {'; '.join(problems)[:400]}",
                stacklevel=2,
            )
        return bool(problems)

    def train(self, mode: bool = True) -> MemoryBank:
        """As that of a module, after `inspect`."""
        self.inspect()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryBank:
        was_meta = self.keys.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.keys.is_meta:  # to_empty: nothing else brings a tensor from there
            self.reset()
        return self

    @torch.no_grad()
    def enqueue(
        self,
        embeddings: Tensor,  # [B, D, H, W]
        labels: Tensor,  # [B, H, W]
        *,
        confidence: Tensor | None = None,
        min_purity: float = 0.0,
        priority: Tensor | None = None,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        """Add one region and up to `pixels_per_image` pixels for every (image, class) that occurs.

        Rows are added in image order; the pixels are those of the smallest (priority, pixel index), in pixel order.
        Rings wrap: if there are more rows than slots, only the last ones are kept. A row whose norm is zero or not
        finite is never stored. Nothing waits for the device.

        Args:
            embeddings: any strides, need not be normalised; on the device of the bank.
            labels: ground truth at the size of the embeddings, any integer dtype; with `min_purity` of any size, picked
                at the nearest pixel if it differs.
            confidence: of the shape of the labels, floating point, in [0, inf). Pixels are drawn with chance
                proportional to it, see `hard_anchor_sampling`. One of confidence 0 counts neither as a pixel nor in a
                region; all others count alike in a region's mean.
            min_purity: a pixel of the embeddings counts only if its label is at least this share, in [0, 1], of the
                labels under it.
            priority: [B, H, W] int32, drawn by `torch.randint` if None.
            generator: for that draw.
            backend: see `available_backends`.

        Raises:
            TypeError: embeddings or confidence that are not floating point, labels that are not integers, priority that
                is not int32.
            ValueError: shapes or devices that do not fit; a bank that requires grad; a number out of range; on the CPU
                also a label that is neither a class nor `ignore_index`, and a confidence that is negative or not
                finite; in a distributed job ranks whose banks differ.
            RuntimeError: in a distributed job, a rank that does not come.
        """
        checks.check_embeddings(embeddings)
        self.check(embeddings)
        batch, _, height, width = embeddings.shape
        checks.check_share("min_purity", min_purity)
        size = (height, width)
        checks.check_labels("labels", labels, None if min_purity > 0 else (batch, *size), embeddings.device)
        if min_purity > 0:
            check_map("labels", labels, 3, embeddings)
        if confidence is not None:
            checks.check_weights("confidence", confidence, tuple(labels.shape), embeddings.device)
            confidence = resize_nearest(confidence, size)
        labels = pick_classes(labels, size, min_purity, self.num_classes, self.ignore_index)
        if priority is None:
            priority = draw_priority(labels, generator)
        check_priority(priority, labels)
        if confidence is not None:
            labels = steering.only_drawn(labels, confidence, self.ignore_index)
            priority = steering.weigh_priority(priority, confidence)
        self.append(embeddings, labels, priority, self._resolve(backend, embeddings))

    @torch.no_grad()
    def append(
        self,
        embeddings: Tensor,  # [B, D, H, W]
        labels: Tensor,  # [B, H, W] int64
        priority: Tensor,  # [B, H, W] int32
        backend: str,
    ) -> None:
        """`enqueue` of what has been checked, by a backend that serves it."""
        self._write(*self._collect(embeddings, labels, priority, self.pixels_per_image, backend), backend)

    @torch.no_grad()
    def append_drawn(
        self,
        embeddings: Tensor,  # [1, D, N, 1]
        groups: Tensor,  # [N] int64
        priority: Tensor,  # [N] int32
        images: int,
        backend: str,
    ) -> None:
        """`append` of pixels that have been drawn from some images; a region is the mean of the pixels drawn.

        `groups` says where each is from: image x num_classes + class, or -1 for a row that is padding.
        """
        rows, row_labels = enqueue.collect(
            embeddings,
            groups[None, :, None],
            priority[None, :, None],
            backend,
            num_classes=images * self.num_classes,
            pixels_per_image=self.pixels_per_image,
            ignore_index=-1,
            normalize=self.normalize,
            dtype=self.keys.dtype,
        )
        row_labels = torch.where(row_labels >= 0, row_labels % self.num_classes, -1)
        of_image = images, self.num_classes, 1 + self.pixels_per_image
        self._write(rows.view(*of_image, self.embed_dim), row_labels.view(of_image), backend)

    @torch.no_grad()
    def enqueue_rows(
        self,
        rows: Tensor,  # [N, D]
        labels: Tensor,  # [N]
        *,
        backend: str | None = None,
    ) -> None:
        """Add rows without a map to the pixel rings, all of them, in their order.

        For embeddings of any origin: a memory as metric learning has it, tokens of a transformer. Rings wrap: if there
        are more rows than slots, only the last ones are kept. A row whose norm is zero or not finite is never stored.
        There are no images, so no regions. Needs scratch for num_classes x N x D elements. In a distributed job as
        `enqueue`.

        Args:
            rows: fp32, fp16 or bf16, any strides, need not be normalised; on the device of the bank.
            labels: any integer dtype; `ignore_index` leaves a row out.
            backend: see `available_backends`.

        Raises:
            TypeError, ValueError, RuntimeError: as `enqueue`.
        """
        if not isinstance(rows, Tensor) or not rows.dtype.is_floating_point:
            got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"rows must be a floating-point tensor, got {got}")
        if rows.dim() != 2 or rows.shape[1] != self.embed_dim:
            raise ValueError(f"rows must have shape [N, {self.embed_dim}], got {tuple(rows.shape)}")
        checks.check_labels("labels", labels, (rows.shape[0],), rows.device)
        embeddings, labels = rows.T[None, :, None], labels[None, None]  # one image, one pixel high
        everything = torch.zeros_like(labels, dtype=torch.int32)  # of one priority: all are taken
        self.check(embeddings)
        name = self._resolve(backend, embeddings)
        candidates, candidate_labels = self._collect(
            embeddings, labels.long(), everything, rows.shape[0], name
        )
        candidate_labels[:, :, 0] = -1  # the region
        self._write(candidates, candidate_labels, name)

    def _collect(
        self, embeddings: Tensor, labels: Tensor, priority: Tensor, pixels_per_image: int, backend: str
    ) -> tuple[Tensor, Tensor]:
        return enqueue.collect(
            embeddings,
            labels,
            priority,
            backend,
            num_classes=self.num_classes,
            pixels_per_image=pixels_per_image,
            ignore_index=self.ignore_index,
            normalize=self.normalize,
            dtype=self.keys.dtype,
        )

    def _resolve(self, backend: str | None, embeddings: Tensor) -> str:
        widest = torch.float64 if self.keys.dtype == torch.float64 else embeddings.dtype
        return backends.resolve(backend, "enqueue_collect", embeddings.device, widest)

    def _write(self, rows: Tensor, row_labels: Tensor, backend: str) -> None:
        enqueue.write(
            rows,
            row_labels,
            self.keys,
            self.key_labels,
            self.region_ptr,
            self.region_fill,
            self.pixel_ptr,
            self.pixel_fill,
            region_slots=self.region_slots,
            exchange=self._exchange,
            backend=backend,
        )

    @property
    def process_group(self) -> dist.ProcessGroup | str | None:
        """What candidates are exchanged with, as given at construction."""
        return self._exchange.process_group

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse a damaged bank, or one of another size, whole: nothing of it is copied."""
        error_msgs: list[str] = args[-1]
        problems = [f"{prefix}{problem}" for problem in self._problems(state_dict, prefix)]
        if problems:
            error_msgs.extend(problems)
            return
        name = f"{prefix}keys"
        if self.normalize and name in state_dict:
            state_dict[name] = self._of_unit_norm(state_dict[name], state_dict[f"{prefix}key_labels"])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if name in state_dict and not self.keys.is_meta:
            self._born_on_meta = False

    def _of_unit_norm(self, keys: Tensor, labels: Tensor) -> Tensor:
        """The keys themselves, or, if the bank was averaged with those of other times, a copy on the unit sphere."""
        norms = keys.float().norm(dim=-1)
        wrong = (labels >= 0) & ((norms - 1).abs() > _UNIT)
        if not wrong.any():
            return keys
        warnings.warn(
            f"{int(wrong.sum())} of {int((labels >= 0).sum())} keys in the checkpoint do not have norm 1 (from "
            f"{norms[wrong].min():.3g} to {norms[wrong].max():.3g}) and are normalised. An average over steps (EMA) "
            "does that to a bank; leave the bank out of it.",
            stacklevel=2,
        )
        return torch.where(wrong[..., None], F.normalize(keys.float(), dim=-1).to(keys.dtype), keys)

    def _problems(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """What is wrong with the bank in a state dict; nothing if there is no bank in it at all."""
        found = {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}
        if not found:
            return []
        problems = [f"{name}: missing in the checkpoint" for name in self._buffers if name not in found]
        for name, value in found.items():
            own = getattr(self, name)
            if not isinstance(value, Tensor):
                problems.append(f"{name}: expected a tensor, got {type(value).__name__}")
            elif value.shape != own.shape:
                problems.append(
                    f"{name}: the checkpoint has shape {tuple(value.shape)}, this bank {tuple(own.shape)} "
                    f"(num_classes={self.num_classes}, region_slots={self.region_slots}, "
                    f"pixel_slots={self.pixel_slots}, embed_dim={self.embed_dim})"
                )
            elif value.dtype != own.dtype and not (name == "keys" and value.dtype.is_floating_point):
                problems.append(f"{name}: the checkpoint has {value.dtype}, this bank {own.dtype}")
            elif value.is_meta:
                problems.append(
                    f"{name}: the checkpoint has a tensor on the meta device, which holds nothing"
                )
        if problems:
            return problems

        keys, labels = found["keys"].to(self.keys.dtype), found["key_labels"]
        wrong = (~keys.isfinite()).nonzero()
        if len(wrong):
            problems.append(f"keys: {len(wrong)} values are not finite, the first at {wrong[0].tolist()}")
        wrong = ((labels >= 0) & (keys == 0).all(-1)).nonzero()
        if self.normalize and len(wrong):
            problems.append(
                f"keys: {len(wrong)} with a label are 0, which no bank holds, the first at {wrong[0].tolist()}"
            )
        own_class = torch.arange(self.num_classes, device=labels.device)[:, None]
        wrong = ((labels != own_class) & (labels != -1)).nonzero()
        if len(wrong):
            place = wrong[0].tolist()
            problems.append(
                f"key_labels: {place} is {int(labels[tuple(place)])}, "
                f"expected {place[0]} or -1 ({len(wrong)} such)"
            )
        used = (labels >= 0).split([self.region_slots, self.pixel_slots], dim=1)
        for kind, slots, filled in zip(
            ("region", "pixel"), (self.region_slots, self.pixel_slots), used, strict=True
        ):
            ptr, fill = found[f"{kind}_ptr"], found[f"{kind}_fill"]
            if ((ptr < 0) | (ptr >= max(slots, 1))).any():
                problems.append(f"{kind}_ptr: expected 0 <= ptr < {slots}, got {ptr.tolist()}")
            if ((fill < 0) | (fill > slots)).any():
                problems.append(f"{kind}_fill: expected 0 <= fill <= {slots}, got {fill.tolist()}")
            elif (fill != filled.sum(dim=1)).any():
                problems.append(
                    f"{kind}_fill: {fill.tolist()} slots in use, but {filled.sum(dim=1).tolist()} have a label"
                )
        return problems
