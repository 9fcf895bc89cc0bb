"""What the GPU kernels take, read from their binaries: no GPU is needed and nothing is timed."""
