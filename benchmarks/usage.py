"""What a script was called with, of those that have no options to name."""

import sys
from collections.abc import Callable


def arguments(description: str, *kinds: Callable[[str], object], least: int = 0) -> list:
    """The command line, each argument of its kind, those behind the last kind of that one too.

    Prints the description and ends where it is asked for (--help), and with status 2 where an argument does not fit or
    there are fewer than `least`.
    """
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        print(description.strip())
        raise SystemExit
    try:
        if len(given) >= least:
            return [kinds[min(place, len(kinds) - 1)](x) for place, x in enumerate(given)]
    except ValueError:
        pass
    print(f"got {' '.join(given) or 'no arguments'}, wanted others:\n\n{description.strip()}", file=sys.stderr)
    raise SystemExit(2)
