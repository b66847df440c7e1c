"""What a transfer works on and what it did: segments, attention influence, loss by segment, new tokens.

pieces.py cuts a text, influence.py, loss.py and tokens.py compute; `*_picture.py` draw with
matplotlib, segments_page.py writes HTML. The page of new tokens is report/tokens.py's.
"""
