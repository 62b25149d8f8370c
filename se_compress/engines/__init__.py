"""What engines load: the table of targets, the blueprint of a result, its export and its reload."""
