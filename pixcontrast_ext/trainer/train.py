"""The training loop.

Each step seeds every random generator from (seed, step, rank) before it draws anything, and the images of a
step are a function of (seed, step). So there is no random state to save: a run resumed at step s draws what
the unbroken run draws, and two runs that differ only in their loss see the same weights, images and
augmentations.
"""

from __future__ import annotations

import logging
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from pixcontrast_ext.bank import MemoryBank
from pixcontrast_ext.criterion import PixelContrastCrossEntropyLoss
from pixcontrast_ext.diagnostics import compare_gradients
from pixcontrast_ext.maps import cross_entropy
from pixcontrast_ext.ops.mining import Mining
from pixcontrast_ext.project import Head
from pixcontrast_ext.tap import FeatureTap
from pixcontrast_ext.trainer.augment import Augment
from pixcontrast_ext.trainer.balance import count_classes, median_frequency, read_weights, save_weights
from pixcontrast_ext.trainer.branch import branch, read_start
from pixcontrast_ext.trainer.checkpoints import CheckpointStore, holds_run, read_checkpoint
from pixcontrast_ext.trainer.config import LossConfig, OptimConfig, TrainConfig, flatten, save_config
from pixcontrast_ext.trainer.data import (
    IGNORE,
    StepBatches,
    dataset_spec,
    eval_loader,
    stack_with_sizes,
    to_device,
)
from pixcontrast_ext.trainer.distributed import Ranks, join_ranks
from pixcontrast_ext.trainer.evaluate import evaluate
from pixcontrast_ext.trainer.logs import RunLog, read_rows
from pixcontrast_ext.trainer.memory import PeakMemory
from pixcontrast_ext.trainer.models import build_model, defer_embed_head, drop_embed_head, load_weights
from pixcontrast_ext.trainer.networks.weights import fetch_backbone, load_backbone
from pixcontrast_ext.trainer.pictures import draw_run

log = logging.getLogger(__name__)

_OF_ALL_RANKS = ("anchors", "contrasted", "region_turnover", "pixel_turnover")
"""Diagnostics that add up over the ranks; of the others the mean is taken."""
_SECONDS = 60
"""Between two lines of a log, where there is no terminal to draw a bar on."""
BANK_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    out: Path
    miou: float
    class_iou: dict[str, float]
    seconds_per_step: float
    """Median over the rows of train.csv."""
    memory_mib: float
    """Most memory that training took, by `PeakMemory`, evaluations apart; NaN if it cannot be known."""
    pixel_accuracy: float = math.nan


class CrossEntropy(nn.Module):
    """Cross-entropy on logits upsampled to the labels, without contrast. 0 if no pixel has a label."""

    class_weights: Tensor | None

    def __init__(self, class_weights: Tensor | None = None, align_corners: bool = False) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.register_buffer("class_weights", class_weights)

    def forward(
        self, logits: Tensor, embeddings: Tensor | None, labels: Tensor, *, return_parts: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        loss = cross_entropy(
            logits,
            labels,
            num_classes=logits.shape[1],
            ignore_index=IGNORE,
            class_weights=self.class_weights,
            align_corners=self.align_corners,
        )
        return (loss, {"cross_entropy": loss.detach()}) if return_parts else loss


def build_criterion(
    config: LossConfig,
    num_classes: int,
    embed_dim: int,
    generator: torch.Generator | None = None,
    head: Head | None = None,
    class_weights: Tensor | None = None,
    align_corners: bool = False,
) -> nn.Module:
    """The criterion of `--contrast`, called with logits, embeddings and labels; the contrast draws from `generator`.

    With `head`, which it calls, it is given features in place of embeddings. `class_weights` [C] are those of the
    cross-entropy.
    """
    if config.contrast == "off":
        return CrossEntropy(class_weights, align_corners)
    bank = None
    if config.contrast == "bank":
        bank = MemoryBank(
            num_classes,
            embed_dim,
            region_slots=config.region_slots,
            pixel_slots=config.pixel_slots,
            pixels_per_image=config.pixels_per_image,
            dtype=BANK_DTYPES[config.bank_dtype],
            ignore_index=IGNORE,
        )
    mining = None
    if config.mining != "off":
        counts = config.mining_negatives, config.mining_positives
        mining = Mining(config.mining, *counts, fraction=config.mining_fraction)
    return PixelContrastCrossEntropyLoss(
        num_classes,
        weight=config.weight,
        class_weights=class_weights,
        align_corners=align_corners,
        warmup_steps=config.warmup_steps,
        temperature=config.temperature,
        base_temperature=config.base_temperature,
        max_samples=config.max_samples,
        max_views=config.max_views,
        min_pixels=config.min_pixels,
        hard_fraction=config.hard_fraction,
        anchors=config.anchors,
        min_purity=config.min_purity,
        max_samples_over=config.max_samples_over,
        ignore_index=IGNORE,
        bank=bank,
        mining=mining,
        generator=generator,
        head=head,
        bank_samples=config.bank_samples,
        region_views=config.region_views,
        backend=config.backend,
    )


def share_norms(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Let the batch norms of several ranks on CUDA see the whole batch, not their share of a few images."""
    if ranks.world > 1 and ranks.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW. Weight decay is for weights, not for biases and norms.

    A group's "rate" is its learning rate as a multiple of that of the step, its "names" those of its parameters.
    """
    of_backbone = {id(weight) for weight in model.backbone.parameters()}  # type: ignore[union-attr]
    groups = []
    for rate, is_backbone in ((1.0, True), (config.head_lr, False)):
        weights = {
            name: weight
            for name, weight in model.named_parameters()
            if (id(weight) in of_backbone) == is_backbone
        }
        for decay, is_decayed in ((config.weight_decay, True), (0.0, False)):
            of_group = {name: weight for name, weight in weights.items() if (weight.dim() > 1) == is_decayed}
            groups.append(
                {
                    "params": list(of_group.values()),
                    "names": list(of_group),
                    "weight_decay": decay,
                    "rate": rate,
                }
            )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of `step` in 0..steps-1: a linear rise over `lr_warmup` steps times a decay to 0."""
    rise = min(1.0, (step + 1) / config.lr_warmup) if config.lr_warmup else 1.0
    decay: float = (1 - step / steps) ** config.power
    return config.lr * rise * decay


def seed_of(*key: int) -> int:
    """A seed from a tuple of integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def seed_all(*key: int) -> None:
    """Seed torch (kornia draws from it), numpy and random from a tuple of integers."""
    seed = seed_of(*key)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def train(config: TrainConfig, *, resume: bool = False) -> Result:
    """Train a model and leave config, logs, checkpoints and pictures in `config.out`.

    Under torchrun, every rank calls this and takes its share of each batch.

    Args:
        config: see `TrainConfig`.
        resume: go on from the newest whole checkpoint in `config.out`, to the same numbers as an unbroken
            run; from the start if there is none yet.

    Raises:
        ValueError: an option that is out of range or does not fit the data, with its value.
        FileExistsError: `config.out` holds a run already and `resume` is false, or another process trains in it.
        CheckpointError: resuming, and every checkpoint is damaged.
        FloatingPointError: the loss or the gradient norm is no longer finite.
    """
    config.validate()
    with join_ranks(config.device) as ranks:
        if not resume and holds_run(config.out):
            raise FileExistsError(f"{config.out} holds a run already: --resume it or choose another --out")
        ranks.wait()  # before the first rank makes such a file
        with ranks.hold(config.out):
            return _Run(config, ranks, resume).finish()


class _Run:
    """The parts of one run on one rank."""

    def __init__(self, config: TrainConfig, ranks: Ranks, resume: bool) -> None:
        self.config, self.ranks = config, ranks
        self.memory = PeakMemory(ranks.device)
        self.spec = dataset_spec(config.data.dataset)
        self.train_set = self.spec.training_set(config.data)
        self.val_set = self.spec.build(config.data, "val")
        num_classes = len(self.spec.classes)

        seed_all(config.seed)
        net = config.net
        model = build_model(net.model, num_classes, net.embed_dim, net.head, align_corners=net.align_corners)
        head: Head | None = None
        if config.loss.contrast == "off":
            drop_embed_head(model)
        elif config.loss.project == "used":
            defer_embed_head(model)
            head = self._embed
        model = share_norms(model, ranks)
        self.model = model.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # A stream of its own: with and without contrast, everything else in a step draws the same.
        self.generator = torch.Generator(ranks.device)
        weights = self._class_weights(resume)
        criterion = build_criterion(
            config.loss, num_classes, net.embed_dim, self.generator, head, weights, net.align_corners
        )
        self.criterion = criterion.to(ranks.device)
        self.auxiliary = CrossEntropy(weights, net.align_corners).to(ranks.device)
        self.shared: FeatureTap | None = None
        if config.diagnose_every and config.loss.contrast != "off":
            self.shared = FeatureTap(self.model.backbone, of="output")
        self.optimizer = build_optimizer(self.model, config.optim)
        self.augment = Augment(config.data) if config.data.augment else None

        self.checkpoints = CheckpointStore(config.out / "checkpoints", config.keep_checkpoints)
        self.start = self._restore() if resume else 0
        if self.start == 0:
            self._start_from_weights()
        if self.start == 0 and config.branch_from is not None:
            state = read_start(config.branch_from, config.optim.optimizer)
            self.start = branch(self.model, self.optimizer, state, config.branch_from)
            if self.start >= config.last_step:
                raise ValueError(
                    f"--branch-from {config.branch_from} is of step {self.start}, the run ends at {config.last_step}"
                )
            # The warm-up is over when it would be without a branch.
            if isinstance(self.criterion, PixelContrastCrossEntropyLoss):
                self.criterion.contrast.step.fill_(min(self.start, config.loss.warmup_steps))
        batches = StepBatches(
            len(self.train_set),  # type: ignore[arg-type]
            config.batch_size,
            steps=config.last_step,
            seed=config.seed,
            start=self.start,
            rank=ranks.rank,
            world=ranks.world,
        )
        pin_memory = ranks.device.type == "cuda"
        self.loader = DataLoader(  # its workers stay: one reading of it is the whole run
            self.train_set,
            batch_sampler=batches,
            collate_fn=stack_with_sizes,
            num_workers=config.data.workers,
            pin_memory=pin_memory,
        )
        self.val_loader = eval_loader(
            self.val_set,
            max(1, config.batch_size // ranks.world),
            rank=ranks.rank,
            world=ranks.world,
            workers=config.data.workers,
            pin_memory=pin_memory,
        )
        if config.compile:
            self.model.compile()
        # The criterion stays outside: its bank keeps the ranks in step on its own.
        self.replica = DistributedDataParallel(self.model) if ranks.world > 1 else self.model
        self.log: RunLog | None = None
        if ranks.is_first:
            config.out.mkdir(parents=True, exist_ok=True)
            save_config(config, config.out / "config.json")
            self.log = RunLog(config.out, self.start)
        self.best = self._best_so_far()

    def finish(self) -> Result:
        """Train to the last step, draw the pictures and read the result from the record."""
        config = self.config
        self.model.train()
        self.criterion.train()
        told = window_start = time.perf_counter()
        window_steps = 0
        progress = tqdm(
            total=config.last_step,
            initial=self.start,
            desc=config.out.name,
            disable=None if self.ranks.is_first else True,  # None: only a terminal gets a bar
        )
        for step, batch in enumerate(self.loader, start=self.start):
            done = step + 1
            logs = done % config.log_every == 0 or done == config.last_step
            evaluates = done % config.eval_every == 0 or done == config.last_step
            saves = done % config.checkpoint_every == 0 or done == config.last_step
            row = self._step(step, batch, measure=logs or saves)
            window_steps += 1
            progress.update()
            if logs:
                row["seconds_per_step"] = (time.perf_counter() - window_start) / window_steps
                row["memory_mib"] = self.memory.mib()
                self._write("train", row)
                progress.set_postfix(loss=f"{row['loss']:.3f}")
                if progress.disable and self.ranks.is_first and time.perf_counter() - told > _SECONDS:
                    told = time.perf_counter()
                    line = f"step {done} of {config.last_step}, loss {row['loss']:.3f}"
                    print(
                        f"{config.out.name}: {line}, {row['seconds_per_step']:.3f} s a step", file=sys.stderr
                    )
            if logs or evaluates or saves:
                if evaluates:
                    self._evaluate(done)
                    self.memory.restart()
                if saves:
                    self._save(done)
                window_start, window_steps = time.perf_counter(), 0
        progress.close()
        if self.log is not None:
            self.log.close()
        self.ranks.wait()  # here: to draw takes longer than ranks wait for each other
        if self.ranks.is_first and config.pictures:
            draw_run(self.model, self.val_set, self.spec, config.out, self.ranks.device, amp=config.amp)
        return read_result(config.out, self.spec.classes)

    def _step(self, step: int, batch: Any, *, measure: bool) -> dict[str, float]:
        """One optimiser step. Returns the row for the record if `measure`, which waits for the device."""
        config, ranks = self.config, self.ranks
        seed_all(config.seed, step, ranks.rank)
        self.generator.manual_seed(seed_of(config.seed, step, ranks.rank, 1))
        images, labels = to_device(batch[:2], ranks.device)
        if self.augment is not None:
            images, labels = self.augment(images, labels, batch[2])
        images = images.contiguous(memory_format=torch.channels_last)
        diagnoses = self.shared is not None and (step + 1) % config.diagnose_every == 0
        if self.shared is not None:
            self.shared.records = diagnoses
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.amp == "bf16"):
            outputs = self.replica(images)
        logits, embeddings = outputs["seg"].float(), outputs.get("embed", outputs.get("features"))
        # Else kernels are compiled within measured steps.
        if (
            step == self.start
            and images.is_cuda
            and isinstance(self.criterion, PixelContrastCrossEntropyLoss)
        ):
            begin = time.perf_counter()
            self.model.embed_head.eval()  # its statistics are not to count these pixels twice
            self.criterion.warm_up(logits, embeddings, labels)
            self.model.embed_head.train()
            torch.cuda.synchronize(images.device)
            log.info("the kernels of the loss are ready after %.1f s", time.perf_counter() - begin)
            self.memory.restart()
        found = self._found(logits, embeddings, labels) if diagnoses else {}
        loss, parts = self.criterion(logits, embeddings, labels, return_parts=True)
        if diagnoses:
            self._diagnose(step + 1, found, loss, logits, labels)
        total, auxiliary = loss, None
        if "aux" in outputs:
            auxiliary = self.auxiliary(outputs["aux"].float(), None, labels)
            total = loss + config.loss.aux_weight * auxiliary

        rate = learning_rate(config.optim, step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        parameters = list(self.model.parameters())
        norm = nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])
        if config.optim.clip:
            nn.utils.clip_grads_with_norm_(parameters, config.optim.clip, norm)
        self.optimizer.step()

        if not measure:
            return {}
        cross_entropy = parts["cross_entropy"]
        terms = {"loss": total, "cross_entropy": cross_entropy, "contrast": parts.get("contrast", 0 * loss)}
        if auxiliary is not None:
            terms["auxiliary"] = auxiliary
        terms["gradient_norm"] = norm
        values = ranks.mean(torch.stack([value.detach().float() for value in terms.values()])).tolist()
        row = {"step": step + 1, "lr": rate, **dict(zip(terms, values, strict=True))}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
            raise FloatingPointError(
                f"the loss is {row['loss']} and the gradient norm {row['gradient_norm']} at step {step + 1} "
                f"(learning rate {rate:.3g}): try a lower --lr or --clip"
            )
        return row

    @torch.no_grad()
    def _found(self, logits: Tensor, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What the contrast finds before the step. A head that the loss calls keeps its running statistics."""
        head = self.model.embed_head
        # Those of a head that the model has called are a part of its graph.
        buffers = list(head.buffers()) if self.config.loss.project == "used" else []
        before = [buffer.clone() for buffer in buffers]
        found: dict[str, Tensor] = self.criterion.diagnostics(logits, embeddings, labels)  # type: ignore[operator]
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        return found

    def _diagnose(
        self, step: int, found: dict[str, Tensor], loss: Tensor, logits: Tensor, labels: Tensor
    ) -> None:
        """Write a row of what `criterion.diagnostics` has found, and of the two gradients at the shared features."""
        assert self.shared is not None
        entropy = cross_entropy(
            logits,
            labels,
            num_classes=logits.shape[1],
            ignore_index=IGNORE,
            class_weights=self.auxiliary.class_weights,
            align_corners=self.config.net.align_corners,
        )
        ratio, cosine = compare_gradients(loss - entropy, entropy, self.shared.take())
        self.shared.records = False  # an evaluation now would leave its features there
        found = {**found, "gradient_ratio": ratio, "gradient_cosine": cosine}
        columns: dict[str, Tensor] = {}
        for name, value in found.items():
            names = (
                [name] if value.dim() == 0 else [f"{name[:-3]}/{of_class}" for of_class in self.spec.classes]
            )
            columns.update(zip(names, value.float().flatten().unbind(), strict=True))
        own = torch.stack(list(columns.values()))
        known = ~own.isnan()  # a rank without an anchor knows no mean
        sums, ranks = self.ranks.sum(torch.stack([own.nan_to_num(), known.float()]))
        of_all = [name.partition("/")[0].startswith(_OF_ALL_RANKS) for name in columns]
        values = torch.where(torch.tensor(of_all, device=own.device), sums, sums / ranks).tolist()
        self._write("diagnostics", {"step": step, **dict(zip(columns, values, strict=True))})

    def _embed(self, features: Tensor) -> Tensor:
        """The model's projection head, for the loss to call where the model leaves it out."""
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
            embeddings: Tensor = self.model.embed_head(features)
        return embeddings

    def _write(self, name: str, row: dict[str, float]) -> None:
        if self.log is not None:
            self.log.add(name, row)

    def _evaluate(self, step: int) -> None:
        # The ranks' running statistics differ after a step, and those of the first go into the checkpoint.
        self.ranks.copy_from_first(self.model.buffers())
        scores = evaluate(self.model, self.val_loader, self.spec.classes, self.ranks, amp=self.config.amp)
        row = {"step": step, "miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy}
        self._write("val", {**row, **scores.class_iou})
        if self.ranks.is_first and scores.miou > self.best:
            self.best = scores.miou
            model = {name: value.cpu() for name, value in self.model.state_dict().items()}
            self.checkpoints.save_best(
                {"step": step, "model": model, "config": flatten(self.config), "miou": scores.miou}
            )
        if self.ranks.is_first:
            name, steps = self.config.out.name, self.config.last_step
            tqdm.write(f"{name}: step {step} of {steps}, mIoU {scores.miou:.3f} on val", file=sys.stderr)

    def _save(self, step: int) -> None:
        if self.log is not None:
            self.log.sync()
            state = {
                "step": step,
                "model": self.model.state_dict(),
                "criterion": self.criterion.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "config": flatten(self.config),
            }
            self.checkpoints.save(step, state)
        self.ranks.wait()

    def _class_weights(self, resume: bool) -> Tensor | None:
        """Those of `--class-weights`. What is counted stands in class_weights.json, and is counted once."""
        chosen, classes = self.config.loss.class_weights, self.spec.classes
        if chosen == "off":
            return None
        if chosen != "auto":
            return read_weights(Path(chosen), classes)
        path = self.config.out / "class_weights.json"
        if not (resume and path.exists()):  # those of another run are not ours
            ranks, workers = self.ranks, self.config.data.workers
            counts = count_classes(self.train_set, len(classes), workers, ranks.rank, ranks.world)
            weights = median_frequency(*ranks.sum(counts.to(ranks.device)).cpu())
            if ranks.is_first:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_weights(weights, classes, path)
        self.ranks.wait()
        return read_weights(path, classes)

    def _best_so_far(self) -> float:
        """The mIoU of best.pt; nothing if there is none, or if it is of a step that this run is yet to take."""
        path = self.config.out / "best.pt"
        if self.start == 0 or not path.exists():
            return -math.inf
        state = read_checkpoint(path)
        return float(state["miou"]) if state["step"] <= self.start else -math.inf

    def _start_from_weights(self) -> None:
        net = self.config.net
        if net.weights is not None:
            load_backbone(self.model, net.weights)
        elif net.pretrained:
            fetch_backbone(self.model)

    def _restore(self) -> int:
        """Load the newest whole checkpoint; returns its step, 0 if there is none."""
        found = self.checkpoints.load_latest()
        if found is None:
            log.warning("no checkpoint in %s yet: starting from step 0", self.checkpoints.folder)
            return 0
        path, state = found
        changed = {
            name: (state["config"].get(name), value)
            for name, value in flatten(self.config).items()
            if state["config"].get(name) != value and name != "out"
        }
        if self.ranks.is_first:
            log.warning("resuming from %s", path)
            for name, (before, now) in changed.items():
                log.warning("--%s was %r, is now %r", name.replace("_", "-"), before, now)
        if state["step"] > self.config.last_step:
            raise ValueError(f"--steps is {self.config.last_step}, but {path} is of step {state['step']}")
        if "optimizer" in changed:
            before, now = changed["optimizer"]
            raise ValueError(f"--optimizer is {now!r}, but {path} was trained with {before!r}")
        weights = [
            "off" if each is None else each.tolist()
            for each in (self.auxiliary.class_weights, state["criterion"].get("class_weights"))
        ]
        if weights[0] != weights[1]:
            raise ValueError(f"--class-weights are {weights[0]}, but {path} was trained with {weights[1]}")
        load_weights(self.model, state["model"])
        options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        try:
            self.criterion.load_state_dict(state["criterion"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not fit the options of this run: {error}") from error
        for group, values in zip(self.optimizer.param_groups, options, strict=True):
            group.update(values)  # this run's, not those that came with the state
        return int(state["step"])


def read_result(out: Path, classes: tuple[str, ...]) -> Result:
    """The result of a finished run, from its record."""
    last = read_rows(out / "val.csv")[-1]
    rows = read_rows(out / "train.csv")
    seconds = float(np.median([row["seconds_per_step"] for row in rows]))
    memory = float(np.max([row["memory_mib"] for row in rows]))
    of_class = {name: last[name] for name in classes}
    return Result(out, last["miou"], of_class, seconds, memory, last["pixel_accuracy"])
