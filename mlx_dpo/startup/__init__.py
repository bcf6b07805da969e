"""Prepare the process before MLX and mlx-lm are imported."""
