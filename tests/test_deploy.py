"""The files of docs/deploy: what they hand to torchrun and to matt-fast are options that these have."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser
from typer.main import get_command

from matt_fast.cli import app

PAGES = Path(__file__).parents[1] / "docs" / "deploy"


def block(page: str, language: str) -> str:
    return re.search(rf"^```{language}\n(.*?)^```$", (PAGES / page).read_text(), re.MULTILINE | re.DOTALL)[1]


def run(script: str, folder: Path, **environment: str) -> list[str]:
    """What a shell script hands to torchrun; the programs that it calls are stand-ins."""
    programs = {
        "torchrun": 'printf "%s\\n" "$@" > words',
        "srun": 'shift; "$@"',
        "scontrol": "printf 'node-1\\nnode-2\\n'",
        "source": "",
    }
    (folder / "bin").mkdir()
    for name, body in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    script = script.replace("source /shared/venv/bin/activate", "set -eu").replace("~/venv/bin/", "")
    given = os.environ | environment | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], check=True, cwd=folder, env=given, timeout=30)
    return (folder / "words").read_text().splitlines()


def words_of(page: str, folder: Path) -> list[str]:
    match page:
        case "slurm.md":
            given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2"}
            return run(block(page, "bash"), folder, SLURM_GPUS_ON_NODE="8", **given)
        case "skypilot.md":
            given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
            script = yaml.safe_load(block(page, "yaml"))["run"]
            words = run(script, folder, SKYPILOT_NODE_IPS="10.0.0.4\n10.0.0.5", **given)
            assert {"--local-addr=10.0.0.5", "--rdzv-conf=is_host=0"} <= set(words)
            return words
        case "kubernetes.md":
            service, job = yaml.safe_load_all(block(page, "yaml"))
            pod = job["spec"]["template"]["spec"]
            assert pod["subdomain"] == service["metadata"]["name"]
            assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
            assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
            return pod["containers"][0]["args"]
        case "index.md":
            return shlex.split(block(page, "sh").replace("\\\n", ""))[1:]


@pytest.mark.parametrize("page", sorted(x.name for x in PAGES.glob("*.md")))
def test_commands_have_options_that_exist(page, tmp_path):
    words = words_of(page, tmp_path)
    found = get_args_parser().parse_args(words)
    assert (found.nnodes, found.nproc_per_node, found.rdzv_backend) == ("2", "8", "c10d")
    assert found.module
    assert found.training_script == "matt_fast"
    name, *options = found.training_script_args
    command = get_command(app).commands[name]
    context = command.make_context(name, options)
    assert str(context.params["resume"]) == "auto"
    assert context.params["output"].name in ("result", "FOLDER")
