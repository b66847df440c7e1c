"""What rows are trained for (objectives.py), and how (loop.py, options.py, frozen.py)."""
