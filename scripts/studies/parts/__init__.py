"""Parts of the studies, in a folder with the name of each study."""
