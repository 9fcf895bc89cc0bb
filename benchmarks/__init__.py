"""Timings, and what the compiled kernels take: measured, recorded as rows, and rendered into the documents."""
