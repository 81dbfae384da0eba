"""The command line, `jaxtune <command>`: one module per command."""
