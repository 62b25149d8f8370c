"""A model, run and operated on: its weights on disk, a layer at a time, surgery on its experts."""
