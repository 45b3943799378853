"""What is computed once of the training data, and kept on disk."""
