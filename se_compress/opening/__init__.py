"""A model, opened: where it is, what its files and config say, where every tensor belongs."""
