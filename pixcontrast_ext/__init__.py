"""Cross-image pixel contrast for semantic segmentation (arXiv 2101.11939), as a loss for any trainer."""

from pixcontrast_ext.backends import available_backends, use_backend
from pixcontrast_ext.bank import MemoryBank
from pixcontrast_ext.head import ProjectionHead
from pixcontrast_ext.loss import PixelContrastCrossEntropyLoss, PixelContrastLoss
from pixcontrast_ext.ops.gather import GatherEmbeddings, gather_embeddings
from pixcontrast_ext.ops.infonce import BlockwiseInfoNCE, infonce
from pixcontrast_ext.ops.sampling import AnchorSample, hard_anchor_sampling

__version__ = "0.1.0"

__all__ = [
    "AnchorSample",
    "BlockwiseInfoNCE",
    "GatherEmbeddings",
    "MemoryBank",
    "PixelContrastCrossEntropyLoss",
    "PixelContrastLoss",
    "ProjectionHead",
    "available_backends",
    "gather_embeddings",
    "hard_anchor_sampling",
    "infonce",
    "use_backend",
]
