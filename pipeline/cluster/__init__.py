"""Where work runs: Ray."""
