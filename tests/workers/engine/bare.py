"""The start of a program that finds nothing installed but torch and Triton."""

BARE = """
import sys

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "grpc", "google", "pydantic", "numba", "llvmlite", "numpy", "safetensors", "tokenizers", "transformers",
            "fastapi", "xxhash", "zstandard", "prometheus_client", "psutil", "cryptography", "yaml", "uvloop", "redis",
        }:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuses())
"""
