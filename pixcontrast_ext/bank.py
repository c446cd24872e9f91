"""The memory bank: region and pixel embeddings of the whole training set, in one ring each per class."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixcontrast_ext import ops
from pixcontrast_ext.ops import enqueue

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Group:
    """A process group that a copy of its bank shares."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            "a bank with an explicit process group cannot be pickled; save its state_dict instead"
        )


class MemoryBank(nn.Module):
    """Per class a ring of region embeddings and a ring of pixel embeddings (arXiv 2101.11939, section 3.3).

    A region is the mean embedding of one class in one image. The state is buffers only, so the bank moves,
    saves and loads with the model that holds it:

        keys          [C, R + P, D]  regions first; zeros until filled
        key_labels    [C, R + P]     int32, -1 until filled
        region_ptr, region_fill, pixel_ptr, pixel_fill  [C] int64: next slot to write, and slots in use

    In a distributed job every rank must call `enqueue` at every step; candidates are exchanged in rank order
    and all banks stay bit-identical. Keep the bank outside of `DistributedDataParallel`, or list its buffers
    among those to ignore: broadcasting them is harmless but a waste.

    Args:
        num_classes: C.
        embed_dim: D.
        region_slots, pixel_slots: R and P; either may be 0.
        pixels_per_image: the most pixels that one class of one image adds.
        dtype: of the keys, fp32, fp16 or bf16 (fp64 on the reference backend).
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
        dtype: torch.dtype = torch.float32,
        ignore_index: int = 255,
        normalize: bool = True,
        process_group: dist.ProcessGroup | str | None = "default",
    ) -> None:
        super().__init__()
        ops.check_at_least(1, num_classes=num_classes, embed_dim=embed_dim)
        ops.check_at_least(
            0, region_slots=region_slots, pixel_slots=pixel_slots, pixels_per_image=pixels_per_image
        )
        if dtype not in _DTYPES:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype!r}; one of {_DTYPES}")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
        if process_group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group gives the ranks outside of it
            process_group = None
        if process_group not in ("default", None) and not isinstance(process_group, dist.ProcessGroup):
            raise ValueError(f"process_group must be 'default', a group or None, got {process_group!r}")
        self.num_classes, self.embed_dim = num_classes, embed_dim
        self.region_slots, self.pixel_slots = region_slots, pixel_slots
        self.pixels_per_image, self.ignore_index, self.normalize = pixels_per_image, ignore_index, normalize
        self._group = _Group(process_group) if isinstance(process_group, dist.ProcessGroup) else process_group
        self._exchange_batch = 0  # images a rank offers in an exchange; agreed in the first one
        slots = region_slots + pixel_slots
        self.register_buffer("keys", torch.zeros(num_classes, slots, embed_dim, dtype=dtype))
        self.register_buffer("key_labels", torch.full((num_classes, slots), -1, dtype=torch.int32))
        for name in ("region_ptr", "region_fill", "pixel_ptr", "pixel_fill"):
            self.register_buffer(name, torch.zeros(num_classes, dtype=torch.int64))

    def extra_repr(self) -> str:
        return (
            f"{self.num_classes}, {self.embed_dim}, region_slots={self.region_slots}, pixel_slots={self.pixel_slots}, "
            f"pixels_per_image={self.pixels_per_image}, dtype={self.keys.dtype}"
        )

    def flat(self) -> tuple[Tensor, Tensor]:
        """The keys [K, D] and their labels [K] as views, K = C (R + P).

        Raises:
            ValueError: if the keys require grad.
        """
        self._check_no_grad()
        return self.keys.view(-1, self.embed_dim), self.key_labels.view(-1)

    def _check_no_grad(self) -> None:
        if self.keys.requires_grad:
            raise ValueError(
                "the bank's keys must not require grad: they are written between forward and backward"
            )

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything."""
        self.keys.zero_()
        self.key_labels.fill_(-1)
        for pointer in (self.region_ptr, self.region_fill, self.pixel_ptr, self.pixel_fill):
            pointer.zero_()

    @torch.no_grad()
    def enqueue(
        self,
        embeddings: Tensor,  # [B, D, H, W]
        labels: Tensor,  # [B, H, W]
        *,
        priority: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        """Add one region and up to `pixels_per_image` pixels for every (image, class) that occurs, in image
        order.

        Pixels are those of the smallest (priority, pixel index), in pixel order. Rings wrap; of more than a
        ring holds the last ones stay. A row whose norm is zero or not finite is never stored. Nothing waits
        for the device.

        Args:
            embeddings: any strides, need not be normalised; on the device of the bank.
            labels: ground truth at the size of the embeddings, any integer dtype.
            priority: [B, H, W] int32, drawn by `torch.randint` if None.
            backend: see `available_backends`.

        Raises:
            TypeError: embeddings that are not floating point, labels that are not integers, priority that is
                not int32.
            ValueError: shapes or devices that do not fit; a bank that requires grad; on the CPU also a label
                that is neither a class nor `ignore_index`; in a distributed job a batch larger than the first
                one.
        """
        ops.check_embeddings(embeddings)
        if embeddings.shape[1] != self.embed_dim:
            raise ValueError(f"embeddings must be {self.embed_dim} wide, got {tuple(embeddings.shape)}")
        if embeddings.device != self.keys.device:
            raise ValueError(
                f"embeddings must be on the bank's device {self.keys.device}, got {embeddings.device}"
            )
        self._check_no_grad()
        rows, row_labels = enqueue.collect(
            embeddings,
            labels,
            num_classes=self.num_classes,
            pixels_per_image=self.pixels_per_image,
            ignore_index=self.ignore_index,
            normalize=self.normalize,
            dtype=self.keys.dtype,
            priority=priority,
            backend=backend,
        )
        rows, row_labels = self._exchange(rows, row_labels)
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
            backend=backend,
        )

    @property
    def process_group(self) -> dist.ProcessGroup | str | None:
        return self._group.group if isinstance(self._group, _Group) else self._group

    def _exchange_group(self) -> dist.ProcessGroup | None:
        """The group to exchange with, or None if there is none or it has one rank."""
        if self.process_group is None or not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if isinstance(self.process_group, str) else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def _exchange(self, rows: Tensor, row_labels: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' candidates, in rank order.

        The shape of an exchange has to be known on every rank without asking, so the largest batch of the
        first exchange sets it; smaller batches are padded with rows that nobody stores.
        """
        group = self._exchange_group()
        if group is None:
            return rows, row_labels
        batch, world = rows.shape[0], dist.get_world_size(group)
        if self._exchange_batch == 0:
            largest = torch.tensor(batch, device=rows.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            self._exchange_batch = int(largest)
        if batch > self._exchange_batch:
            raise ValueError(
                f"this batch has {batch} images, the largest of the first exchange between ranks had "
                f"{self._exchange_batch}; give the largest batch first"
            )
        missing = self._exchange_batch - batch
        if missing:
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
            row_labels = torch.cat([row_labels, row_labels.new_full((missing, *row_labels.shape[1:]), -1)])
        all_rows = rows.new_empty(world * rows.shape[0], *rows.shape[1:])
        all_labels = row_labels.new_empty(world * rows.shape[0], *row_labels.shape[1:])
        dist.all_gather_into_tensor(all_rows, rows.contiguous(), group=group)
        dist.all_gather_into_tensor(all_labels, row_labels.contiguous(), group=group)
        return all_rows, all_labels

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse a damaged bank, or one of another size, whole: nothing of it is copied."""
        error_msgs: list[str] = args[-1]
        problems = [f"{prefix}{problem}" for problem in self._problems(state_dict, prefix)]
        if problems:
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

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
        if problems:
            return problems

        keys, labels = found["keys"].to(self.keys.dtype), found["key_labels"]
        wrong = (~keys.isfinite()).nonzero()
        if len(wrong):
            problems.append(f"keys: {len(wrong)} values are not finite, the first at {wrong[0].tolist()}")
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
