"""The frozen teachers."""
