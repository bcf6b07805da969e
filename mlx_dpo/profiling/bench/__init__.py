"""Measure how fast this machine trains: products, copies, passes, steps, tokens and memory."""
