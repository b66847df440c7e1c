"""Texts for training: read, cut into aligned chunks, made into batches.

In that order: documents.py, chunks.py, packing.py, batches.py, and stream.py, the endless stream that training takes;
positions.py says where it stands, for any number of processes. prepared.py keeps chunks on disk, shards.py those that
`matt-fast prepare` made; parallel.py reads texts and their translations, for initialisers; snippets.py and
rehearsal.py let a model write texts.
"""
