"""A fused model's tensors, planned and written layer by layer."""
