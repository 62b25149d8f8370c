"""Text becomes sequences of token ids: sources, chat messages, tokenizers, the drawing."""
