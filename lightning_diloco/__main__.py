"""`python -m lightning_diloco` is the `lightning-diloco` command."""

from __future__ import annotations

import sys

from lightning_diloco.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
