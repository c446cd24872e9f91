"""What a user feels: a training step of a network, with the contrast off, by loops and the dense loss, and by ours.

Ours twice: "all" projects every pixel of the features, as the loops do, "used" those that the loss reads. On a CPU the
networks are the trainer's, compact model and HRNets; on a GPU torchvision's DeepLabV3 on a ResNet-50. Cross-entropy,
backward and an SGD step are within the time of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixcontrast_ext import PixelContrastCrossEntropyLoss, ProjectionHead
from pixcontrast_ext.project import Head
from pixcontrast_ext.trainer.models import build_model, defer_embed_head, drop_embed_head
from pixcontrast_ext.trainer.networks.segmentation import ProjectingModel
from tools.torchvision_ops import declare_missing_ops

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
    if device == "cuda":
        return {"cityscapes": (IMAGES["cityscapes"], ("tf32",))}
    return {name: (shape, ("fp32",)) for name, shape in IMAGES.items() if name != "cityscapes"}


def network_of(shape: Images, device: str) -> str:
    """What a shape's network is called."""
    if shape.N:
        return f"HRNet-W{shape.N}"
    return "compact model" if device == "cpu" else "DeepLabV3, ResNet-50"


class DeepLab(ProjectingModel):
    """torchvision's DeepLabV3, stride 8, with a projection head on the backbone's last stage."""

    def __init__(self, num_classes: int, embed_dim: int):
        super().__init__()
        try:
            from torchvision.models.segmentation import deeplabv3_resnet50
        except ImportError as error:
            raise Unavailable(f"torchvision is not installed ({error})") from None
        self.network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=num_classes)
        self.embed_head = ProjectionHead(2048, embed_dim)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.network.backbone(images)["out"]
        return {"seg": self.network.classifier(features), **self.embedded(features)}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, ignore_index=255)


def head_of(model: nn.Module) -> Head:
    """A function around the head, which is the model's and not the loss's."""

    def project(features: Tensor) -> Tensor:
        embeddings: Tensor = model.embed_head(features)  # type: ignore[operator]
        return embeddings

    return project


Criterion = Callable[[dict[str, Tensor], Tensor], Tensor]


class Inputs:
    def __init__(self, shape: Images, device: str):
        self.shape, self.device = shape, device
        self.labels, _ = scenes(shape.B, shape.H, shape.W, shape.C, device=device)
        generator = torch.Generator().manual_seed(5)
        self.images = torch.rand(shape.B, 3, shape.H, shape.W, generator=generator).to(device)

    def model(self) -> nn.Module:
        shape = self.shape
        torch.manual_seed(6)  # the same network for all
        if shape.N:
            declare_missing_ops()
            try:
                return build_model(f"hrnet_w{shape.N}_v2", shape.C, shape.D)
            except ImportError as error:
                raise Unavailable(str(error)) from None
        return build_model("compact", shape.C, shape.D) if self.device == "cpu" else DeepLab(shape.C, shape.D)

    def off(self) -> Method:
        model = drop_embed_head(self.model())
        return Method(both=self.step(model, lambda outputs, labels: cross_entropy(outputs["seg"], labels)))

    def ours(self, backend: str, project: str) -> Method:
        model, embedded, head = self.model(), "embed", None
        if project == "used":
            embedded, head = "features", head_of(defer_embed_head(model))
        criterion = PixelContrastCrossEntropyLoss(
            self.shape.C,
            weight=WEIGHT,
            temperature=TEMPERATURE,
            max_samples=self.shape.A,
            bank=full_bank(self.shape, self.device),
            head=head,
            backend=backend,
        )
        return self.method(
            self.step(model, lambda outputs, labels: criterion(outputs["seg"], outputs[embedded], labels))
        )

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

        return self.method(self.step(self.model(), criterion))

    def step(self, model: nn.Module, criterion: Criterion) -> Callable[[], Tensor]:
        model.to(self.device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def call() -> Tensor:
            loss = criterion(model(self.images), self.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return call

    def method(self, step: Callable[[], Tensor]) -> Method:
        def verify() -> Errors:
            """The first step's loss beside that of ours on every pixel: the same weights, anchors drawn anew."""
            return {"loss of the first step": (abs(step().item() / self.first_loss - 1), 0.01)}

        return Method(both=step, verify=verify)

    @cached_property
    def first_loss(self) -> float:
        method = self.ours("reference", "all")
        assert method.both is not None
        outcome = method.both()
        assert isinstance(outcome, Tensor)
        return outcome.item()


def case(shape: Images, dtype: str, device: str, backends: list[str], name: str = "") -> Case:
    inputs = cache(lambda: Inputs(shape, device))
    matrices = BUFFERS * 4 * shape.A * shape.K

    def candidate(backend: str, project: str) -> Candidate:
        needs = matrices if backend == "reference" else 0
        return Candidate(lambda: inputs().ours(backend, project), needs)

    candidates = {"contrast off": Candidate(lambda: inputs().off())}
    candidates |= {
        f"ours ({backend}), {project}": candidate(backend, project)
        for backend in backends
        for project in ("all", "used")
    }
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
        base="contrast off",
    )
