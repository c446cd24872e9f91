"""Cross-image pixel contrast for semantic segmentation (arXiv 2101.11939), as a loss for any trainer."""

from pixcontrast_ext.backends import available_backends, use_backend
from pixcontrast_ext.bank import MemoryBank
from pixcontrast_ext.criterion import PixelContrastCrossEntropyLoss
from pixcontrast_ext.diagnostics import compare_gradients
from pixcontrast_ext.head import ProjectionHead
from pixcontrast_ext.loss import PixelContrastLoss
from pixcontrast_ext.ops.gather import GatherEmbeddings, gather_embeddings
from pixcontrast_ext.ops.infonce import BlockwiseInfoNCE, infonce
from pixcontrast_ext.ops.mining import DrawnKeys, Mining, Thresholds, draw_keys, score_thresholds
from pixcontrast_ext.ops.sampling import AnchorSample, hard_anchor_sampling
from pixcontrast_ext.tap import FeatureTap, WithEmbeddings

__version__ = "0.1.0"

__all__ = [
    "AnchorSample",
    "BlockwiseInfoNCE",
    "DrawnKeys",
    "FeatureTap",
    "GatherEmbeddings",
    "MemoryBank",
    "Mining",
    "PixelContrastCrossEntropyLoss",
    "PixelContrastLoss",
    "ProjectionHead",
    "Thresholds",
    "WithEmbeddings",
    "available_backends",
    "compare_gradients",
    "draw_keys",
    "gather_embeddings",
    "hard_anchor_sampling",
    "infonce",
    "score_thresholds",
    "use_backend",
]
