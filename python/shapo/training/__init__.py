"""Training loops on Accelerate: supervised fine-tuning (`sft`) and preference optimisation with or without ShaPO
(`preference`), on one process or the ranks of a launcher.

Nothing is imported here, so that `shapo.config` costs no import of torch.
"""
