"""Triton kernels for the Attention Influence Modeling loss. Imports torch and triton only."""
