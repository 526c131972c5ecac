"""Extraction: what is to be made, and making it."""
