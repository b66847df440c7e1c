"""One transfer in a process of its own, whose peak of memory is its own.

The process is a new Python that never runs the user's script: a script needs no `if __name__ == "__main__"`.
"""

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import dill

from matt_fast.recipe.result import TransferResult
from matt_fast.recipe.transfer import transfer
from matt_fast.support.workers import die_with_parent

GRACE = 60.0  # seconds for a process to end by itself when it has sent its result
POLL = 1.0  # seconds between two looks at whether the process lives


def transfer_apart(arguments: Mapping, callbacks: Mapping[str, Callable]) -> TransferResult:
    """Run `transfer` in a new process, which ends with this one.

    Args:
        arguments: of `transfer`. They are pickled with dill, so that functions of the user's script, lambdas and
            closures among them, work; what they use must be picklable too.
        callbacks: those of `transfer` by name; they are called in this process.

    Raises:
        TypeError: an argument that cannot be pickled.
        RuntimeError: the process was killed, or ended without a result.
        Exception: what `transfer` raises there, or a callback here.
    """
    try:
        message = dill.dumps((dict(arguments), list(callbacks)), recurse=True)
    except Exception as error:
        raise TypeError(f"arguments: wanted what dill can pickle for another process, got {error}") from error
    ours, theirs = Pipe()
    command = [sys.executable, "-P", "-m", "matt_fast.recipe.isolated", str(theirs.fileno()), str(os.getpid())]
    # Found where this process finds them: matt_fast itself, and modules beside the user's script.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # Ctrl-C is for this process, which ends the other
    )
    theirs.close()
    try:
        ours.send_bytes(message)
        while (received := _receive(ours, process))[0] == "call":
            _, name, values = received
            callbacks[name](*values)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)  # one that is killed leaves its semaphores behind
        kind, value = received
        if kind == "error":
            raise value
        return value
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(f"the process of a transfer {_how_it_ended(process.wait())}") from error
    finally:
        ours.close()
        process.kill()
        process.wait()


def _receive(connection: Connection, process: subprocess.Popen) -> tuple:
    """The next message; EOFError if the process has ended, even where a process of its own keeps the pipe open."""
    while not connection.poll(POLL):
        if process.poll() is not None and not connection.poll():
            raise EOFError
    return connection.recv()


def _how_it_ended(status: int) -> str:
    if status != -signal.SIGKILL:
        return f"ended with exit code {status} and no result"
    return "was killed (SIGKILL), as systems do when memory runs out"


def _portable(error: Exception) -> Exception:
    """The error, with its traceback as a note; or its text, where it cannot be pickled and read again."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note("In the process of the transfer:\n" + traceback.format_exc())
    return error


def main(handle: int, parent: int) -> None:
    """What the new process does: read arguments from the connection, send calls of callbacks and the result."""
    die_with_parent(parent)
    connection = Connection(handle)
    try:
        arguments, names = dill.loads(connection.recv_bytes())
        send = lambda name, *values: connection.send(("call", name, values))  # noqa: E731
        result = transfer(**arguments, **{name: partial(send, name) for name in names})
        connection.send(("result", result))
    except Exception as error:
        connection.send(("error", _portable(error)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
