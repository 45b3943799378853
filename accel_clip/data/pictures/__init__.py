"""From stored pictures to pixels at the size of the model."""
