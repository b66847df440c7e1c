"""How OpenMP's threads wait: set by programs, never by an import, and a user's own setting wins."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from matt_fast.cli.app import app


@pytest.mark.parametrize(("given", "wanted"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_torchs_openmp_takes_the_setting(given, wanted):
    program = "from matt_fast.support.threads import wait_passively; wait_passively(); import torch"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true", **given}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{wanted}'" in done.stderr


def test_commands_set_it_and_imports_do_not(monkeypatch):
    program = "import os; given = dict(os.environ); import matt_fast, matt_fast.cli.app; assert os.environ == given"
    subprocess.run([sys.executable, "-c", program], check=True)
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")  # and afterwards as it was
    CliRunner().invoke(app, ["evaluate", "--model=missing", "--data=missing"])
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
