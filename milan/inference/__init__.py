"""Using what was trained: predictions, embeddings, nearest images."""
