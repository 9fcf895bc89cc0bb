"""What a machine with a GPU is asked: checks of every kernel, then timings. `python -m benchmarks.gpu` runs it."""
