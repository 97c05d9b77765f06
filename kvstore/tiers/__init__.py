"""Where blocks are kept beside device pages: memory and disk of this worker.

Nothing here decides what stays: see kvstore.placement.
"""
