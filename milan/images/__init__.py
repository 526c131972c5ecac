"""Images: listing, manifest, decoding, view sampling."""
