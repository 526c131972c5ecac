"""Images: found, listed, decoded, cut into views."""
