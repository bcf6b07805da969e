"""The runs of the study of label noise: expected, counted and sampled labels."""
