"""Tokenizers judged, before a model gets one."""
