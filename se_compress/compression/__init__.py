"""Make the result, a layer at a time."""
