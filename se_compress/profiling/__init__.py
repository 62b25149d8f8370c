"""Measure a model: what its experts do, and which of them are super experts."""
