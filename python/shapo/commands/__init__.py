"""One module for each command of `shapo`: `SUMMARY`, `OPTIONS` (groups of `shapo.options`) and `run(arguments)`.

Options are declared without importing torch or transformers, so that `--help` is immediate; `run` imports what it
needs.
"""
