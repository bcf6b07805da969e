"""Parts of the study `label_noise`: its losses, and runs on expected and sampled labels."""
