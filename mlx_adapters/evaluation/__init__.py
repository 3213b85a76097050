"""How good a model is on rows it has not seen: loss, distance from another model, task scores, with errors."""
