"""How blocks become few bytes and come back: quantisation, entropy coding, the bitstream (docs/kv-bitstream.md).

Everything here may run in any thread and holds the interpreter lock for microseconds only.
"""
