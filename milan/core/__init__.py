"""What every room stands on: randomness, paths, files, devices, processes."""
