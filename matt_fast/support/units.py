"""Sizes in units that people read."""

MIB, GIB = 1 << 20, 1 << 30


def size_in_words(count: float) -> str:
    """Bytes in the unit that reads best: "3.2 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
