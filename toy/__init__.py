"""The toy world: everything that ships with the repository and runs offline."""
