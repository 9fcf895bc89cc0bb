"""One module for each command of `shapo`: `SUMMARY`, `OPTIONS` (groups of `shapo.options`) and `run(arguments)`.

A command with a folder as --output names what it replaces there in `REPLACES`; nothing of it may be an input, and the
folder is locked while the command runs. Options that name a file say whether it is read or written.

Options are declared without importing torch or transformers, so that `--help` is immediate; `run` imports what it
needs.
"""
