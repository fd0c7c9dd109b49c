"""``python -m condgan``: the same as the ``condgan`` command."""

import sys

from condgan.cli import main

if __name__ == "__main__":
    sys.exit(main())
