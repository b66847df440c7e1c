"""What a transfer works on and what it did: segments, attention influence, loss by segment, new tokens.

pieces.py cuts a text, influence.py, loss.py and tokens.py compute; `*_picture.py` draw with
matplotlib, `*_page.py` write HTML.
"""
