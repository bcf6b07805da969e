"""Translate configurations of other trainers (TRL, LLaMA-Factory, Axolotl and others)."""
