"""Arguments of another type than the annotations of public functions: a TypeError names each at once."""

import inspect

import pytest

from matt_fast import apply, compare_initializers, doctor, plan, sweep_layers, tokenizers, transfer
from matt_fast.recipe.evaluating import evaluate_models
from matt_fast.recipe.preparing import prepare

FUNCTIONS = (apply, compare_initializers, doctor, evaluate_models, plan, prepare, sweep_layers, transfer)
FUNCTIONS += (tokenizers.extend, tokenizers.train, tokenizers.merge, tokenizers.prune)
TAKE_ANY = ("resume", "options")  # checked by value; and what is handed on
HELD_BACK = ("on_check", "output", "on_progress")  # of doctor: its own


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda x: f"{x.__module__}.{x.__name__}")
def test_each_is_named(function):
    parameters = inspect.signature(function).parameters
    needed = {name: "x" for name, x in parameters.items() if x.default is x.empty and x.kind is not x.VAR_KEYWORD}
    needed |= {name: value for name, value in (("size", 300), ("keep", 300), ("inits", ["mean"])) if name in needed}
    needed |= {name: {"x": "x"} for name in ("models", "texts") if name in needed}
    for name in parameters.keys() - {*TAKE_ANY, *(HELD_BACK if function is doctor else ())}:
        with pytest.raises(TypeError, match=rf"^{name}: wanted \w+.*, got <object object at"):
            function(**needed | {name: object()})


def test_numbers_of_numpy_and_whole_ones_for_fractions_are_taken():
    import numpy as np

    from matt_fast.support.checks import check_argument_types

    given = {"n_layers": np.int64(3), "epochs": 2, "seed": np.int32(1), "eval_data": {"a": "b"}, "language": ("uk",)}
    check_argument_types(transfer, given)
    for name, value in (("n_layers", 1.5), ("batch_size", True), ("device", 0), ("map_tokens", 3)):
        with pytest.raises(TypeError, match=f"{name}: wanted "):
            check_argument_types(transfer, {name: value})
