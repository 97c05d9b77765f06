"""Which weights a worker may keep quantized, and beside which dtype."""

QUANTIZATIONS = ("none", "int8")


def check_quantization(quantize: str, *, dtype: str) -> None:
    """Raises `ValueError`."""
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {quantize!r}")
    if quantize != "none" and dtype != "float32":
        raise ValueError(
            f"quantize {quantize} needs dtype float32, got {dtype!r}: what is not int8 is float32"
        )
