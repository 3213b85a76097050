"""Many adapters on one base: layers made for inference, switching, mixed batches."""
