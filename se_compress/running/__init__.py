"""A run on this machine: where it writes, what it keeps, and whether there is room for it."""
