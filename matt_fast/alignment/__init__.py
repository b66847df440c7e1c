"""What two tokenizers have in common: segments of a text (segments.py), tokens of a vocabulary (vocabulary.py)."""
