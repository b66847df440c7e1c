"""Memory and work of a training step, from configurations alone."""
