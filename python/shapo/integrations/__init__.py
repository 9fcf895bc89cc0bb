"""ShaPO inside other people's training loops: a mixin for `transformers.Trainer` and `trl`'s trainers."""

from .arguments import ShaPOArguments
from .fused_head import FusedHeadMixin
from .state import ShaPOState
from .trainer import ShaPOTrainerMixin

__all__ = ["FusedHeadMixin", "ShaPOArguments", "ShaPOState", "ShaPOTrainerMixin"]
