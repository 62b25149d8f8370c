"""Pages for people: report, model card, comparison."""
