"""One page that tells what transfers did, from the records of their runs; page.py puts the parts together.

Each part is a file: sentences, figures, curves (charts.py), the sample text, tokens, the comparison of several runs.
page.css and page.js are what the page looks like and what it does.
"""
