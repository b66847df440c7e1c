"""What rows are trained for (objectives.py), and how (loop.py, options.py, frozen.py)."""

import logging

# Their warnings, one for each product of each step and one when peft imports bitsandbytes, are of speed only.
for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)
