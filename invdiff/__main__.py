"""``python -m invdiff``, and what torchrun starts: the command line."""

import sys

from invdiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
