"""One step: from gradients to weights, for all parameters at once."""
