"""Recipes: settings for well-known models on Macs of several sizes, with their planned memory."""
