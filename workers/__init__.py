"""Computes: requests, the scheduler, the engine, the models, and the server of a worker.

Never imports the control plane: the two meet only in `protos`.
"""
