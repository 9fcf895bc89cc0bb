"""ShaPO as a method: data, probe, selection, training, evaluation and the command line.

Needs transformers and datasets; the kernels, the optimizer and the losses are in `shapo_kernels`, which needs torch
alone.
Importing this package is cheap: what is heavy is imported by the module that uses it.
"""

from shapo.errors import UserError

__all__ = ["UserError"]
