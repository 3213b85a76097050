"""One step of training: loss, gradient, update."""
