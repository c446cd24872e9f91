"""The projection head: from a network's features to pixel embeddings."""

from __future__ import annotations

from torch import Tensor, nn

from pixcontrast_ext.ops import checks


class ProjectionHead(nn.Module):
    """Two 1x1 convolutions from features [B, in_channels, H, W] to embeddings [B, embed_dim, H, W].

    It does not normalise: the loss does that, for the few pixels it reads. Used in training only. Source:
    arXiv 2101.11939, section 3.4.

    Args:
        in_channels: of the features.
        embed_dim: of the embeddings.
        kind: "convmlp": 1x1 convolution, batch norm, ReLU, 1x1 convolution; "linear": one 1x1 convolution.
    """

    def __init__(self, in_channels: int, embed_dim: int = 256, kind: str = "convmlp") -> None:
        super().__init__()
        checks.check_at_least(1, in_channels=in_channels, embed_dim=embed_dim)
        if kind == "convmlp":
            self.project = nn.Sequential(
                nn.Conv2d(in_channels, in_channels, kernel_size=1, bias=False),
                nn.BatchNorm2d(in_channels),
                nn.ReLU(inplace=True),
                nn.Conv2d(in_channels, embed_dim, kernel_size=1),
            )
        elif kind == "linear":
            self.project = nn.Sequential(nn.Conv2d(in_channels, embed_dim, kernel_size=1))
        else:
            raise ValueError(f"kind must be 'convmlp' or 'linear', got {kind!r}")

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings [B, embed_dim, H, W] of features [B, in_channels, H, W]."""
        embeddings: Tensor = self.project(features)
        return embeddings
