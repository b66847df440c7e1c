"""A run over two hosts, of which one is lost and comes back: `make two-hosts`. Needs root, Linux and iproute2.

The hosts are two network namespaces of this machine, host-a and host-b, with a name, an address and an /etc/hosts of
their own and a cable (veth) between them; the disk is shared. Each runs torchrun with one worker of a tiny transfer.
What happens is printed as it happens; what is left is compared with a run that nothing happened to.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from killing import digests, prepare
from safetensors.torch import load_file

HOSTS = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
CABLE = {"host-a": "matt-a", "host-b": "matt-b"}
SETTING = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "MATT_FAST_TIMEOUT": "10"}
LAUNCH = [
    "--nnodes=2",
    "--nproc-per-node=1",
    "--max-restarts=3",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=host-a:29400",
]
OPTIONS = ["--objective=aim", "--steps=60", "--lr=1e-2"]
BACK_AFTER = 6  # seconds
NOISE = re.compile(
    r"\[c10d\]|\[W|(it|examples)/s\]|^frame #|^Exception raised|^<omitting|^Traceback|^  |^The above|^[=-]+$"
)

start = time.monotonic()


def tell(who: str, what: str) -> None:
    print(f"{time.monotonic() - start:6.1f} s  {who:7} {what}", flush=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def make_hosts() -> None:
    remove_hosts()
    for host in HOSTS:
        ip("netns", "add", host)
        etc = Path("/etc/netns") / host
        etc.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in HOSTS.items())]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
    a, b = HOSTS
    ip("link", "add", CABLE[a], "netns", a, "type", "veth", "peer", "name", CABLE[b], "netns", b)
    for host, address in HOSTS.items():
        ip("-n", host, "addr", "add", f"{address}/24", "dev", CABLE[host])
        ip("-n", host, "link", "set", "lo", "up")
        ip("-n", host, "link", "set", CABLE[host], "up")


def remove_hosts() -> None:
    for host in HOSTS:
        lose(host)
        subprocess.run(["ip", "netns", "del", host], stderr=subprocess.DEVNULL)
        shutil.rmtree(Path("/etc/netns") / host, ignore_errors=True)


def lose(host: str) -> None:
    """All processes of a host are gone at once."""
    found = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()
    for process in map(int, found):
        os.kill(process, signal.SIGKILL)


def torchrun(host: str, words: list[str]) -> subprocess.Popen:
    """torchrun on a host; its words are printed."""
    command = [sys.executable, "-m", "torch.distributed.run", *LAUNCH, "-m", "matt_fast", "transfer", *words]
    inside = ["unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh", *command]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": os.environ | SETTING}
    process = subprocess.Popen(["ip", "netns", "exec", host, *inside], **given)

    def read() -> None:
        for line in process.stdout:
            if line.strip("*\n ") and not NOISE.search(line):
                tell(host, line.rstrip()[:160])

    threading.Thread(target=read, daemon=True).start()
    return process


def steps(output: Path) -> list[str]:
    return sorted(x.name for x in output.glob("run/checkpoints/step-*"))


def behind_second_checkpoint(output: Path, processes: dict[str, subprocess.Popen]) -> None:
    while len(steps(output)) < 2:
        assert all(x.poll() is None for x in processes.values()), "a host ended before its second checkpoint"
        time.sleep(0.01)
    tell("", f"checkpoints: {', '.join(steps(output))}")


class Scene:
    """A run over both hosts, and what happens to it; `happens` is called behind the second checkpoint."""

    def __init__(self, folder: Path, arguments: dict):
        self.folder, self.arguments = folder, arguments

    def words(self, output: Path, *more: str) -> list[str]:
        options = [f"--{name.replace('_', '-')}={x}" for name, x in self.arguments.items() if "eval" not in name]
        return [f"--output={output}", *options, *OPTIONS, *more]

    def play(self, name: str, happens=None) -> tuple[Path, list[int]]:
        output = self.folder / name
        print(f"\n{name}", flush=True)
        words = self.words(output, "--resume=auto")
        processes = {host: torchrun(host, words) for host in HOSTS}
        if happens is not None:
            behind_second_checkpoint(output, processes)
            happens(processes, words)
        statuses = [process.wait() for process in processes.values()]
        time.sleep(0.3)  # until their last words are read
        tell("", f"exit status of host-a and host-b: {statuses}")
        return output, statuses


def lost_and_back(host: str):
    def happens(processes: dict[str, subprocess.Popen], words: list[str]) -> None:
        lose(host)
        processes[host].wait()
        tell("", f"{host} is lost")
        if host == "host-a":  # the rendezvous was there: the other's torchrun ends too, and is started again
            tell("", f"torchrun on host-b ends with status {processes['host-b'].wait()}")
            processes["host-b"] = torchrun("host-b", words)
        else:
            time.sleep(BACK_AFTER)
        tell("", f"{host} is back")
        processes[host] = torchrun(host, words)

    return happens


def cable_pulled(processes: dict[str, subprocess.Popen], words: list[str]) -> None:
    ip("-n", "host-b", "link", "set", CABLE["host-b"], "down")
    tell("", "the cable of host-b is pulled")
    time.sleep(15)
    ip("-n", "host-b", "link", "set", CABLE["host-b"], "up")
    tell("", "the cable is back")


def main(*names: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="matt-fast-two-hosts-"))
    # of prepared chunks, one a row, one process with accumulation takes those that two take in a step
    scene = Scene(folder, prepare(folder) | {"batch_size": 1, "data_cache": folder / "cache"})
    make_hosts()
    try:
        print(f"torchrun {' '.join(LAUNCH)} -m matt_fast transfer … --resume=auto")
        whole, statuses = scene.play("both hosts, left alone")
        assert statuses == [0, 0]
        one = folder / "one process"
        command = [sys.executable, "-m", "matt_fast", "transfer", *scene.words(one, "--accumulation=2", "--quiet")]
        subprocess.run(command, check=True, env=os.environ | SETTING)
        tables = [load_file(x / "model.safetensors") for x in (whole, one)]
        differs = max(float((tables[0][name] - tables[1][name]).abs().max()) for name in tables[0])
        losses = [[json.loads(x)["loss"] for x in (y / "run/metrics.jsonl").open()] for y in (whole, one)]
        far = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
        print(f"one process with accumulation 2: weights differ by {differs:.2g} at most, losses by {far:.2g} of them")
        for name, happens in {
            "host-b lost and back": lost_and_back("host-b"),
            "host-a, which has the rendezvous, lost and back": lost_and_back("host-a"),
            "cable pulled for 15 s": cable_pulled,
        }.items():
            if names and not any(x in name for x in names):
                continue
            output, statuses = scene.play(name, happens)
            same = digests(output) == digests(whole)
            print(f"{name}: {'same bits' if same else 'OTHER BITS'}")
    finally:
        remove_hosts()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
