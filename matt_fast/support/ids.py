"""Ids that stand for nothing, the same in all rooms."""

SPECIAL = -100  # the segment of a token that is in none: padding and special tokens
PADDING = -1  # the document of padding
