"""The folder of a run, the same for who works in it and who reads what it left.

folder.py says what lies there and who may write; record.py what it tells, finished or not.
"""
