"""Workers end with their parent, whatever ends it and whatever handlers it had."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from matt_fast.support.workers import Ahead, ProcessDiedError

PARENT = """
import multiprocessing, os, signal, sys, time
from matt_fast.support.workers import die_with_parent, forks_die_with_us

signal.signal(signal.SIGTERM, lambda *_: say("handler of the parent"))

def say(what):  # a line at a time: print writes its words one by one where Python is told not to buffer
    os.write(1, (what + "\\n").encode())

def work(parent):
    if parent is not None:
        die_with_parent(parent)
        die_with_parent(parent)
    say(f"worker {{os.getpid()}}")
    time.sleep(600)

def grandchild():
    child = context.Process(target=work, args=(None,))
    child.start()
    say(f"worker {{os.getpid()}}")
    child.join()

context = multiprocessing.get_context("fork")
{start}
time.sleep(600)
"""
ONE = "context.Process(target=work, args=(os.getpid(),)).start()"
FORKED = """
with forks_die_with_us():
    context.Process(target=grandchild).start()
    time.sleep(1)
"""


def started(start: str, count: int) -> tuple[subprocess.Popen, list[psutil.Process]]:
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(start=start)], stdout=subprocess.PIPE, text=True)
    return parent, [psutil.Process(int(parent.stdout.readline().split()[1])) for _ in range(count)]


def ended(process: psutil.Process, within: float = 20.0) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("start", "count"), [(ONE, 1), (FORKED, 2)], ids=["called", "forked, two generations"])
def test_workers_of_a_killed_parent_end(start, count):
    parent, workers = started(start, count)
    try:
        time.sleep(1.2)  # longer than a look at the parent takes: they live while it lives
        assert not any(ended(worker, within=0.05) for worker in workers)
        parent.send_signal(signal.SIGKILL)
        assert all(map(ended, workers))
    finally:
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        parent.kill()
        parent.communicate()


def test_sigterm_ends_a_worker_and_sigint_does_not():
    parent, (worker,) = started(ONE, 1)
    try:
        worker.send_signal(signal.SIGINT)
        assert not ended(worker, within=0.3)
        worker.send_signal(signal.SIGTERM)
        assert ended(worker)
        assert parent.poll() is None
    finally:
        parent.kill()
        assert "handler" not in parent.communicate()[0]


def test_the_parent_itself_is_left_alone():
    code = """
    import os, signal, threading
    from matt_fast.support.workers import die_with_parent
    before = signal.getsignal(signal.SIGINT)
    die_with_parent(os.getpid())
    assert threading.active_count() == 1
    assert signal.getsignal(signal.SIGINT) is before
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=os.environ)


POOL = """
import os, sys, time
from matt_fast.support.workers import AHEAD, OrderedPool

class Tool:
    def square(self, n):
        time.sleep(0.02 * (n % 3 == 0))  # later ones are ready before it
        if n == 7:
            raise ValueError("seven")
        return n * n, b"x" * 300_000  # more than a pipe holds

    def negative(self, squared):
        return -squared[0]

    def end(self, n):
        os._exit(3)

def numbers():
    for n in range(100):
        read.append(n)
        yield n

read = []
with OrderedPool(3, Tool()) as pool:
    results = pool.map("negative", pool.map("square", numbers()))
    found = [next(results)]
    assert len(read) < 6 * AHEAD * 3, read  # not far ahead
    try:
        for result in results:
            found.append(result)
    except ValueError as error:
        found.append(str(error))
    assert found == [0, -1, -4, -9, -16, -25, -36, "seven"], found
for idle, code in ((False, 3), (True, -9)):
    with OrderedPool(2, Tool()) as pool:
        if idle:
            [x.kill() for x in pool._processes.values()]
            [x.join() for x in pool._processes.values()]
        try:
            list(pool.map("negative", pool.map("square" if idle else "end", range(9))))
        except ChildProcessError as error:
            assert f"exit code {code}" in str(error)
        else:
            raise AssertionError
with OrderedPool(2, Tool()) as pool:
    results = pool.map("square", iter(range(6)))
    next(results)
    print("worker", *(x.pid for x in pool._processes.values()), flush=True)
    time.sleep(600)
"""


def test_results_come_in_order_and_a_worker_that_dies_is_noticed():
    parent = subprocess.Popen([sys.executable, "-c", POOL], stdout=subprocess.PIPE, text=True)
    try:
        workers = [psutil.Process(int(x)) for x in parent.stdout.readline().split()[1:]]
        assert len(workers) == 2
        parent.send_signal(signal.SIGKILL)
        assert all(map(ended, workers))
    finally:
        parent.kill()
        parent.communicate()


def test_a_process_that_is_killed_in_the_middle_of_an_item_is_noticed():
    """The third item is larger than a pipe, and begun while nobody reads."""

    def stopping():
        yield b"0"
        yield b"1"
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        yield b"x" * (1 << 26)

    def slow(content):
        time.sleep(content == b"1")
        return content

    with Ahead(stopping, slow, ahead=1) as items:
        assert [next(items), next(items)] == [b"0", b"1"]
        with pytest.raises(ProcessDiedError, match="exit code -9"):
            next(items)
    with Ahead(lambda: iter([b"a", b"b"]), bytes.decode) as items:
        assert list(items) == ["a", "b"]
    with Ahead(lambda: iter([b"\xff", b"b"]), bytes.decode) as items:
        assert isinstance(next(items), UnicodeDecodeError)
        assert next(items) == "b"
