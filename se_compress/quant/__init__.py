"""Number formats and solvers: tensors in, tensors out, no files."""
