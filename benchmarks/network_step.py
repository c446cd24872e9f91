"""What a user feels: a training step of a network, with the contrast off, by loops and the dense loss, and by ours.

On a CPU the trainer's compact model; on a GPU torchvision's DeepLabV3 on a ResNet-50. Cross-entropy, backward and an
SGD step are within the time of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixcontrast_ext import PixelContrastCrossEntropyLoss, ProjectionHead
from pixcontrast_ext.trainer.models import build_model, drop_embed_head

from .baselines.dense import BUFFERS
from .harness import Candidate, Case, Errors, Method, Unavailable
from .inputs import scenes
from .shapes import IMAGES, Images
from .training_step import TEMPERATURE, full_bank, looped_bank, looped_loss

SHAPE = Images
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
DTYPES = {"cpu": ("fp32",), "cuda": ("fp32", "tf32")}
COUNTED = "nothing: what counts is how far a step is above the one without contrast"
WEIGHT = 0.1


def plan(device: str) -> dict[str, tuple[Images, tuple[str, ...]]]:
    name = "camvid-half" if device == "cpu" else "cityscapes"
    return {name: (IMAGES[name], ("fp32",) if device == "cpu" else ("tf32",))}


class DeepLab(nn.Module):
    """torchvision's DeepLabV3, stride 8, with a projection head on the backbone's last stage."""

    def __init__(self, num_classes: int, embed_dim: int):
        super().__init__()
        try:
            from torchvision.models.segmentation import deeplabv3_resnet50
        except ImportError as error:
            raise Unavailable(f"torchvision is not installed ({error})") from None
        self.network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=num_classes)
        self.embed_head: nn.Module | None = ProjectionHead(2048, embed_dim)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.network.backbone(images)["out"]
        outputs = {"seg": self.network.classifier(features)}
        if self.embed_head is not None:
            outputs["embed"] = self.embed_head(features)
        return outputs


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, ignore_index=255)


Criterion = Callable[[dict[str, Tensor], Tensor], Tensor]


class Inputs:
    def __init__(self, shape: Images, device: str):
        self.shape, self.device = shape, device
        self.labels, _ = scenes(shape.B, shape.H, shape.W, shape.C, device=device)
        generator = torch.Generator().manual_seed(5)
        self.images = torch.rand(shape.B, 3, shape.H, shape.W, generator=generator).to(device)

    def step(self, criterion: Criterion, with_head: bool) -> Callable[[], Tensor]:
        torch.manual_seed(6)  # the same network for all
        if self.device == "cpu":
            model: nn.Module = build_model("compact", self.shape.C, self.shape.D)
        else:
            model = DeepLab(self.shape.C, self.shape.D)
        if not with_head:
            drop_embed_head(model)
        model.to(self.device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def call() -> Tensor:
            loss = criterion(model(self.images), self.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return call

    def off(self) -> Method:
        return self.method(lambda outputs, labels: cross_entropy(outputs["seg"], labels), with_head=False)

    def ours(self, backend: str) -> Method:
        criterion = PixelContrastCrossEntropyLoss(
            self.shape.C,
            weight=WEIGHT,
            temperature=TEMPERATURE,
            max_samples=self.shape.A,
            bank=full_bank(self.shape, self.device),
            backend=backend,
        )
        return self.method(lambda outputs, labels: criterion(outputs["seg"], outputs["embed"], labels))

    def looped(self) -> Method:
        bank = looped_bank(full_bank(self.shape, self.device))

        def criterion(outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
            logits, embeddings = outputs["seg"], F.normalize(outputs["embed"], dim=1)
            size = embeddings.shape[-2:]
            picked = F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0].long()
            contrast = looped_loss(bank, embeddings, picked, logits.argmax(1), self.shape.A)
            loss = cross_entropy(logits, labels) + WEIGHT * contrast
            bank.enqueue(embeddings.detach(), picked)
            return loss

        return self.method(criterion)

    def method(self, criterion: Criterion, with_head: bool = True) -> Method:
        step = self.step(criterion, with_head)

        def verify() -> Errors:
            """The first step's loss beside that of the loops: the same weights, anchors drawn anew."""
            first = step().item()
            if not with_head:
                return {}
            truth = self.first_loss
            return {"loss of the first step": (abs(first / truth - 1), 0.01)}

        return Method(both=step, verify=verify)

    @cached_property
    def first_loss(self) -> float:
        method = self.ours("reference")
        assert method.both is not None
        outcome = method.both()
        assert isinstance(outcome, Tensor)
        return outcome.item()


def case(shape: Images, dtype: str, device: str, backends: list[str], name: str = "") -> Case:
    inputs = cache(lambda: Inputs(shape, device))
    matrices = BUFFERS * 4 * shape.A * shape.K

    def candidate(backend: str) -> Candidate:
        return Candidate(lambda: inputs().ours(backend), matrices if backend == "reference" else 0)

    candidates = {"contrast off": Candidate(lambda: inputs().off())}
    candidates |= {f"ours ({backend})": candidate(backend) for backend in backends}
    candidates["loops + dense"] = Candidate(lambda: inputs().looped(), matrices)
    return Case(
        "network_step",
        name or str(shape),
        shape,
        dtype,
        device,
        candidates,
        {},
        COUNTED,
        "contrast off",
    )
