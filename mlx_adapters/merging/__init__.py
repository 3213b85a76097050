"""Several adapters into one, and an adapter out of a full fine-tune."""
