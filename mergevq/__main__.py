"""`python -m mergevq`: the command line."""

import sys

from mergevq.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
