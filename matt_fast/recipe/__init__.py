"""The whole job, from a model and a text to a folder that loads."""
