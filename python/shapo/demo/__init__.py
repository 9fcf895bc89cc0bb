"""The demo: its settings, its steps, the worker processes and its report."""
