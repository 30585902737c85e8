"""Where a token stands: coordinates for patches, positions and rotary embeddings for sequences."""
