"""`python -m jaxtune` is `jaxtune`."""

from jaxtune.cli.main import main

main()
