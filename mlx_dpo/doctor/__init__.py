"""What this machine is, and whether it trains correctly: `machine` and `checks`."""
