"""This machine, and the door to mlx-lm."""
