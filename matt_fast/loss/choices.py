"""What the AIM loss has a choice of. Imports nothing, so that arguments can be checked before torch is imported."""

from collections.abc import Mapping

CHOICES = {
    "variant": ("aim", "aim_star"),
    "metric": ("mse", "cosine"),
    "reduction": ("pairs", "documents"),
    "backend": ("auto", "triton", "torch", "eager"),
}


def check_choices(chosen: Mapping[str, str]) -> None:
    """Raise a ValueError unless each value is one of CHOICES under its name."""
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}; got {value!r}")
