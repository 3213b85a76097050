"""PEFT's tensors to MLX's and back."""
