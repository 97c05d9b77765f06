"""The operations for GPUs, in Triton: one per file, with its formula, shapes, `reference()`, kernel and launcher.

Only who computes on a GPU imports from here: it needs triton, and nothing of ours but `kernels.gpu` (a bare GPU machine
has no numba, which the CPU's operations need). `paged_kv` and `attention_tile` are what the attentions are made of.
"""
