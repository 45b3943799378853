"""What a model can do: retrieval, validation loss and zero-shot classification."""
