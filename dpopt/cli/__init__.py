"""The `dpopt` command: a verb per file."""
