"""The store and its images as batches for training."""
