"""A pretrained model, whatever its architecture.

teacher.py loads it, capture.py looks into it while it runs, layers.py finds its layers, packed.py keeps documents of
one row apart; embeddings.py and head.py are the student's rows on the way in and out.
"""
