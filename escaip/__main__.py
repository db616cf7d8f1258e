"""``python -m escaip``."""

import sys

from escaip.cli import main

if __name__ == "__main__":
    sys.exit(main())
