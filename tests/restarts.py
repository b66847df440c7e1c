"""Runs of several processes and of two machines that lose a part of themselves: `python tests/restarts.py [NAME ...]`.

A machine is an agent of torchrun with one worker; all are forked from this process, which has imported everything, and
a worker does what the command line does. What each case left is printed as JSON, one a line.
"""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/deploy/index.md
os.environ["MATT_FAST_TIMEOUT"] = "8"

import psutil
from killing import digests, kill, prepare, wait
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import matt_fast.recipe.opening
import matt_fast.recipe.same
import matt_fast.recipe.transfer
import matt_fast.training.loop
from matt_fast.cli import app
from matt_fast.training.checkpoints import Checkpoints

METRICS = Path("run", "metrics.jsonl")
OPTIONS = ["--objective=aim", "--steps=16", "--lr=1e-2", "--quiet", "--resume=auto"]


def command(arguments: dict, output: Path) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items() if "eval" not in name]
    return ["transfer", f"--output={output}", *options, *OPTIONS]


def work(words: list[str], log: str, trouble: Callable[[], None] | None) -> None:
    """What a worker does: the command, with its words in a file, and first what is to go wrong in it."""
    out = os.open(f"{log}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    Path(f"{log}.pid{os.environ['RANK']}").write_text(str(os.getpid()))
    if trouble is not None:
        trouble()
    app(words)


def agent(words: list[str], log: Path, trouble=None, *, port: int, machines: int = 1, workers: int = 1, restarts=0):
    """A machine's agent in a process of its own; returns the process's id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        config = LaunchConfig(
            min_nodes=machines,
            max_nodes=machines,
            nproc_per_node=workers,
            run_id="restarts",
            rdzv_backend="c10d",
            rdzv_endpoint=f"localhost:{port}",
            rdzv_configs={"keep_alive_interval": 1, "keep_alive_max_attempt": 2},
            local_addr="localhost",
            max_restarts=restarts,
            start_method="fork",
        )
        with log.with_suffix(".agent").open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        elastic_launch(config, work)(words, str(log), trouble)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def checkpointed(output: Path, process: int, step: int) -> None:
    """Wait for the checkpoint behind this step, or a later one."""
    while not any(int(x.name[5:]) >= step for x in output.glob("run/checkpoints/step-*")):
        assert wait(process, 0.01) is None, output


class Cases:
    """What is done to two processes; a method each, which returns what it left."""

    def __init__(self, folder: Path):
        # of prepared chunks, one a row, one process with accumulation takes those that two take in a step
        more = {"batch_size": 1, "checkpoint_every": 2, "data_cache": folder / "cache"}
        self.folder, self.arguments = folder, prepare(folder) | more
        self.alone = None

    def place(self, name: str) -> tuple[Path, list[str], Path]:
        place = self.folder / name
        place.mkdir()
        return place / "output", command(self.arguments, place / "output"), place / "log"

    def left_alone(self) -> dict:
        output, words, log = self.place("alone")
        status = wait(agent(words, log, port=free_port(), workers=2))
        self.alone = digests(output)
        alone = output.with_name("one")
        wait(agent([*command(self.arguments, alone), "--accumulation=2"], log, port=free_port()))
        two, one = (load_file(x / "model.safetensors") for x in (output, alone))
        losses = [[json.loads(line)["loss"] for line in (x / METRICS).open()] for x in (output, alone)]
        return {
            "status": status,
            "words": said(log),
            "losses": losses,
            "differs": max(float((two[name] - one[name]).abs().max()) for name in sorted({*one, *two})),
        }

    def lost(self) -> dict:
        """SIGKILL of a worker, which torchrun starts again; then of a whole machine, which is started again later."""
        output, words, log = self.place("lost")
        given = {"port": free_port(), "machines": 2, "restarts": 3}
        processes = [agent(words, log.with_name(f"log{i}"), **given) for i in range(2)]
        checkpointed(output, processes[0], 4)
        first = workers_of(log)
        first[1].kill()
        checkpointed(output, processes[0], 8)
        second = workers_of(log)
        machine = second[1].ppid()
        end(machine)
        time.sleep(0.5)
        again = agent(words, log.with_name("log2"), **given)
        statuses = [wait(x) for x in (*{*processes} - {machine}, again)]
        others = not {x.pid for x in first} & {x.pid for x in second}
        return {"status": statuses, "others": others, "same": digests(output) == self.alone, "words": said(log)}

    def other_files(self) -> dict:
        """One machine has another data file, another tokenizer and another torch."""

        def trouble():
            if os.environ["RANK"] == "1":
                matt_fast.recipe.same.version = lambda name: "9.9" if name == "torch" else version(name)

        output, words, log = self.place("files")
        tokenizer = self.folder / "files" / "other"
        shutil.copytree(self.arguments["tokenizer"], tokenizer)
        with (tokenizer / "tokenizer.json").open("a") as file:
            file.write("\n")
        data = tokenizer.with_name("corpus.jsonl")
        data.write_text(self.arguments["data"].read_text().replace("alpha", "omega"))
        other = command(self.arguments | {"tokenizer": tokenizer, "data": data}, output)
        return self.two(words, other, log, trouble) | {"there": output.exists()}

    def no_file(self) -> dict:
        """One machine lacks the data."""
        output, words, log = self.place("lacks")
        other = command(self.arguments | {"data": self.folder / "nowhere.jsonl"}, output)
        return self.two(words, other, log) | {"there": output.exists()}

    def other_folder(self) -> dict:
        """The output is not shared."""
        matt_fast.recipe.opening.LATE = 0.5
        output, words, log = self.place("folder")
        other = command(self.arguments, output.with_name("elsewhere"))
        return self.two(words, other, log) | {"there": output.exists()}

    def broken_disk(self) -> dict:
        """The main process cannot write its first checkpoint; where a disk is full it would try again."""
        output, words, log = self.place("disk")

        def trouble():
            def write(*given, **more):
                if os.environ["RANK"] == "0":
                    raise OSError(errno.EIO, "Input/output error", "state.safetensors")

            Checkpoints.write = write

        found = self.two(words, words, log, trouble)
        return found | {"left": [x.name for x in output.rglob(".part-*")], "run": (output / "run/run.json").exists()}

    def raises_in_main(self) -> dict:
        """The main process alone raises an error in the middle of a step, while the other waits for it."""
        return self._raises("0")

    def raises_in_other(self) -> dict:
        """The other one does."""
        return self._raises("1")

    def _raises(self, rank: str) -> dict:
        _, words, log = self.place(f"raises{rank}")

        def trouble():
            def losses(*given, **more):
                raise ValueError("data: wanted text, got none")

            if os.environ["RANK"] == rank:
                matt_fast.training.loop.losses = losses

        return self.two(words, words, log, trouble)

    def silent(self) -> dict:
        """A worker does not go on, and does not end either."""
        output, words, log = self.place("silent")
        port = free_port()
        processes = [agent(words, log.with_name(f"log{i}"), port=port, machines=2) for i in range(2)]
        checkpointed(output, processes[0], 2)
        other, stopped = workers_of(log)
        stopped.suspend()
        begin = time.monotonic()
        status = wait(other.ppid(), 30)
        seconds = time.monotonic() - begin
        for process in processes:
            end(process)
        return {"status": status, "seconds": seconds, "words": said(log)}

    def two(self, words: list[str], other: list[str], log: Path, trouble=None) -> dict:
        """What two machines say and end with."""
        port, begin = free_port(), time.monotonic()
        processes = [
            agent(x, log.with_name(f"log{i}"), trouble, port=port, machines=2) for i, x in enumerate((words, other))
        ]
        statuses = [wait(x, 60) for x in processes]
        return {"status": statuses, "seconds": time.monotonic() - begin, "words": said(log)}


def workers_of(log: Path) -> list[psutil.Process]:
    """The workers by their rank."""
    return [psutil.Process(int(x.read_text())) for x in sorted(log.parent.glob("*.pid*"), key=lambda x: x.suffix)]


def end(process: int) -> None:
    """Kill an agent and all that works for it."""
    everyone = []
    with contextlib.suppress(psutil.Error):
        everyone = psutil.Process(process).children(recursive=True)
        kill(process)
    for child in everyone:
        with contextlib.suppress(psutil.Error):
            child.kill()


def said(log: Path) -> list[str]:
    """What each worker printed, in the order of files."""
    return [x.read_text() for x in sorted(log.parent.glob("log*")) if x.suffix[1:].isdecimal()]


def main(*names: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="matt-fast-restarts-"))
    cases = Cases(folder)
    for name in names or [x for x, y in vars(Cases).items() if y.__doc__ and x not in ("two", "place")]:
        begin, work = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        found = getattr(cases, name)()
        work = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - work
        print(json.dumps({"case": name, "took": time.monotonic() - begin, "work": work} | found), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    main(*sys.argv[1:])
