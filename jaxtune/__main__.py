"""`python -m jaxtune` is `jaxtune`."""

import sys

from jaxtune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
