"""What an extraction costs, before it is run."""
