"""One optimizer step: a batch cut, its exact gradient, and what is learned from it."""
