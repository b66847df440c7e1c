"""Recipes by name: options of a transfer that go together. Imports nothing slow.

benchmarks/bench_recipes.py measures them side by side. What a recipe says holds where neither the command line nor a
configuration file says something else.
"""

from collections.abc import Mapping
from types import MappingProxyType

from matt_fast.support.checks import check_choice

_HEALING = {"heal": "lora", "heal_rows_lr": 3e-3}
_ROWS_OF_256 = {"max_length": 256, "batch_size": 4}

RECIPES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        # Within minutes on a CPU: rows and adapters together from the first step on, by the text and by what the model
        # writes itself.
        "quick": {
            "init": "composed",
            "steps": 0,
            "rehearse": 64,
            **_HEALING,
            "heal_objective": "ntp",
            "heal_lr": 2e-3,
            "heal_steps": 80,
            **_ROWS_OF_256,
        },
        # As the paper has it (§3.5, §4.1, Appendix C).
        "paper": {
            "init": "focus",
            "objective": "aim",
            "layer": "third",
            "lr": 1e-4,
            "decay_steps": 0,
            **_ROWS_OF_256,
        },
        # As quick, for hours: every new token comes early, and no conversation is read twice.
        "best": {
            "init": "composed",
            "steps": 0,
            "per_token": 3,
            "rehearse": 1600,
            **_HEALING,
            "heal_objective": "ntp",
            "heal_lr": 1e-3,
            "heal_steps": 2000,
            "heal_rank": 32,
        },
    }
)


def recipe(name: str) -> Mapping[str, object]:
    """The options of a recipe by the names that the command line has.

    Raises:
        ValueError: an unknown name.
    """
    check_choice("recipe", name, RECIPES)
    return RECIPES[name]


def as_options(values: Mapping[str, object]) -> str:
    """Options as they are typed."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
