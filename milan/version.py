"""The version of milan; read without importing anything else."""

__version__ = "1.0.0"
