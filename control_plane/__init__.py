"""Decides: the gateway, routing, the directory, the runtimes and the command line.

Never imports the workers: the two meet only in `protos`. Holds no tensors: nothing here imports torch.
"""
