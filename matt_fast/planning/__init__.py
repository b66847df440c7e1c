"""Memory and work of a training step, from configurations alone: plan.py asks, simulation.py runs a step."""
