"""From the user's files to batches: sources, order, decoding and the loader."""
