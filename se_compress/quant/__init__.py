"""Number formats: tensors in, tensors out, no files."""
