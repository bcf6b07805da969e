"""Parts of the study `principles`: pairs by every method from the same model and prompts."""
