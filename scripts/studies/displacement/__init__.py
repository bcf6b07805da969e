"""Parts of the study of likelihood displacement."""
