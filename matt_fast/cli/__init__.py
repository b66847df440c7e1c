"""The command line."""

from matt_fast.cli.app import app

__all__ = ["app"]
