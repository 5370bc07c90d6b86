"""`python -m sequoia_kernels` is the command line."""

import sys

from sequoia_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
