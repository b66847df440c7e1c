"""The reference library's interface."""
