"""The seams between processes: every .proto file and the code generated from it.

Nothing here is written by hand but the .proto files and `generate.py`; nothing here imports the rest of Penstock.
"""
