"""What mlx-lm does to a checkpoint's tensors when it loads them: the map between both names, found by trying."""
