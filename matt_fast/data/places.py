"""Where prepared chunks are found. Imports nothing slow."""

from pathlib import Path

MANIFEST = "manifest.json"  # of chunks that are whole


def is_url(place: str | Path) -> bool:
    return "://" in str(place)
