"""`python -m shapo` is the command `shapo`."""

import sys

from shapo.cli import main

if __name__ == "__main__":
    sys.exit(main())
