"""Pictures of what a transfer works on and what it did: segments, attention influence, new tokens.

pieces.py cuts a text, influence.py and tokens.py compute; `*_picture.py` draw with matplotlib, `*_page.py` write HTML.
"""
