"""Where a token stands: positions for patches and for sequences."""
