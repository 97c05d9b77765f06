"""How large the tiles of a kernel are, and with how much of a processor it computes them.

Each operation has a table of its own, by the bytes of a stored number or by the number of tokens. `bench.gpu_tune`
measures candidates on a device; what wins is written into the table, so that nothing is tuned when a worker starts.
Until somebody has run it on a Hopper they are what compiling says: no spills with Triton 3.6 nor 3.7, and as many
programs a processor as have 64 KiB or more of a context on their way.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    rows: int  # of the product that a tile is: queries, or outputs of a layer
    columns: int  # tokens of a context, or of a layer
    num_warps: int
    num_stages: (
        int  # tiles in flight, with the one that is computed; half of it where page ids must be read first
    )
