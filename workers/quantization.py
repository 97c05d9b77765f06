"""Which weights and which KV a worker may keep quantized, and beside which dtype."""

from kvstore.layout import SCALED_DTYPES

# Weights and, for each token, activations of 8 bits: products of integers.
CPU_QUANTIZATIONS = ("none", "int8")
# Weights of 8 or 4 bits with a scale for each group of inputs. Activations stay whole; beside weights of fp8 they are
# fp8 too, with a scale for each token.
GPU_QUANTIZATIONS = ("w8a16", "w4a16", "fp8")
# Each is another model to every cache, and says by its name which kernels compute it: what a worker computes passes to
# others that say the same.
QUANTIZATIONS = (*CPU_QUANTIZATIONS, *GPU_QUANTIZATIONS)

# Of pages, and so of blocks wherever they go. With a scale for each token and head, unless it is that of the weights.
KV_DTYPES = ("auto", *SCALED_DTYPES)


def check_quantization(quantize: str, *, dtype: str) -> None:
    """Raises `ValueError`."""
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {quantize!r}")
    if quantize == "int8" and dtype != "float32":
        raise ValueError(
            f"quantize {quantize} needs dtype float32, got {dtype!r}: what is not int8 is float32"
        )
