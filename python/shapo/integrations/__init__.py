"""ShaPO inside other people's training loops: a mixin for ``transformers.Trainer`` and ``trl``'s trainers."""

from .arguments import ShaPOArguments
from .trainer import ShaPOTrainerMixin

__all__ = ["ShaPOArguments", "ShaPOTrainerMixin"]
