"""Runs steps on the model: the only part of a worker that touches tensors. A step plan of the scheduler is not judged.

`engine` is the server's, on the CPU; `offline` answers a batch of prompts by itself, on a CPU or a GPU, and imports
neither a server package nor, unless its kernels are chosen, numba.
"""
