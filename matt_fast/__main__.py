"""`python -m matt_fast`, and so `accelerate launch -m matt_fast`."""

from matt_fast.cli.app import app

app()
