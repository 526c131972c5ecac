"""The commands of milan, one module per stage."""
