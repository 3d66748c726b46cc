"""`python -m gemma2_ext` is the command line `gemma2-ext`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
