"""HTTP servers on this machine: pages behind a token on loopback, and JSON request bodies."""
