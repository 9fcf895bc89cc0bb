"""One module a command of `shapo`: `SUMMARY`, `add_arguments(parser)` and `run(arguments)`.

Arguments are declared without importing torch or transformers, so that `--help` is immediate; `run` imports what it
needs.
"""
