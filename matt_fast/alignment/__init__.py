"""What two tokenizers have in common: segments of a text, tokens of a vocabulary."""
