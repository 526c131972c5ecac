"""Evaluation of encoders: protocols, and what they share."""
