"""Training loops in plain PyTorch: supervised fine-tuning (`sft`) and preference optimisation with or without ShaPO
(`preference`).

One model, one process.  Nothing is imported here, so that `shapo.config` costs no import of torch.
"""
