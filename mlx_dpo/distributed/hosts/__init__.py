"""Several machines: MLX's hostfile, the start of ranks over ssh, and the test of their link."""
