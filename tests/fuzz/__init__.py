"""Generated command lines over all commands: see `run.py`."""
