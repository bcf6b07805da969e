"""What all studies share: claims with bounds, the command line, CSV rows and figures."""
