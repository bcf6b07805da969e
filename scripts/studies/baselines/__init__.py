"""Published methods that the package lacks, for comparison: PPO, unlikelihood, best of N."""
