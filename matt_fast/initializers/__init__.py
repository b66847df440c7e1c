"""Where the rows of new tokens start."""

from typing import TYPE_CHECKING

from matt_fast.support.lazy import lazy_names

if TYPE_CHECKING:
    from matt_fast.initializers.choices import INIT_HEADS as INIT_HEADS
    from matt_fast.initializers.choices import INITS as INITS
    from matt_fast.initializers.choices import METHODS as METHODS
    from matt_fast.initializers.heuristics import Method as Method
    from matt_fast.initializers.heuristics import initialize as initialize
    from matt_fast.initializers.report import InitReport as InitReport
    from matt_fast.initializers.rows import (
        Rows as Rows,
    )
    from matt_fast.initializers.rows import (
        check_init_head as check_init_head,
    )
    from matt_fast.initializers.rows import (
        initial_rows as initial_rows,
    )
    from matt_fast.initializers.rows import (
        needs_whole_model as needs_whole_model,
    )

_WHERE = {
    "INITS": "matt_fast.initializers.choices",
    "INIT_HEADS": "matt_fast.initializers.choices",
    "METHODS": "matt_fast.initializers.choices",
    "InitReport": "matt_fast.initializers.report",
    "Method": "matt_fast.initializers.heuristics",
    "Rows": "matt_fast.initializers.rows",
    "check_init_head": "matt_fast.initializers.rows",
    "initial_rows": "matt_fast.initializers.rows",
    "initialize": "matt_fast.initializers.heuristics",
    "needs_whole_model": "matt_fast.initializers.rows",
}

__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
