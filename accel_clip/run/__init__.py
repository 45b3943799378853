"""A training run: its folder, its parts, what it measures, and how it goes on."""
