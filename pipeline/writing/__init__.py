"""Writing a store, on a disk or in a bucket."""
