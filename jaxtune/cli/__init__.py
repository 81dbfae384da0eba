"""The command line: `jaxtune doctor`, one module per command."""
