"""One module for each command of `shapo`: `SUMMARY`, `OPTIONS` (groups of `shapo.options`) and `run(arguments)`.

Options that name a file or folder say whether it is read, replaced (`writes`), or filled with the names in the module's
`REPLACES` (`fills`; wildcards allowed). No output may be an input, and outputs are locked while the command runs;
`SHARED` lets several processes of one command fill a folder. Outputs like `REMADE` are never read by the command.

Options are declared without importing torch or transformers, so that `--help` is immediate; `run` imports what it
needs.
"""
