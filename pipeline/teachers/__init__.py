"""Frozen teachers: open_clip's CLIPs and the ViTs of timm."""
