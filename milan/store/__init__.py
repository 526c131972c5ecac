"""The target store: its format, and reading it."""
