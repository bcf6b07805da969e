"""What is wrong, or odd, with pairs before anything is trained on them. Prints nothing."""
