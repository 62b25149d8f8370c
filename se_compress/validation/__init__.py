"""Judge a result beside its source."""
