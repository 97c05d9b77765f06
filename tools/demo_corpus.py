"""Text that every Python ships: the language reference inside pydoc and the docstrings of the standard library.

The split is by the hash of a document, so a document is held out on every machine or on none.
"""

import ast
import os
import pydoc_data.topics
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

HELD_OUT_SHARE = 10  # one document, pair or problem in ten never occurs in training
MIN_CHARACTERS = 200
SKIPPED_DIRECTORIES = frozenset({"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"})


def is_held_out(text: str) -> bool:
    """True for the tenth of all texts that only the evaluation may see.

    CRC-32 is the same on every machine.
    """
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def load_documents(*, held_out: bool) -> list[str]:
    """The documents of one side of the split, each once, in a fixed order."""
    return [document for document in _documents() if is_held_out(document) is held_out]


@cache
def _documents() -> tuple[str, ...]:
    """Both sides; remembered, as parsing the whole library takes seconds."""
    return tuple(dict.fromkeys(document for document in _pieces() if len(document) >= MIN_CHARACTERS))


def _pieces() -> Iterator[str]:
    yield from (text.strip() for _, text in sorted(pydoc_data.topics.topics.items()))
    for path in _source_files(Path(sysconfig.get_paths()["stdlib"])):
        yield from _docstrings(path)


def _source_files(root: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(root):
        names[:] = sorted(set(names) - SKIPPED_DIRECTORIES)
        yield from (Path(directory, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a template or an old encoding: the corpus can do without
        return
    found = [tree, *ast.walk(tree)]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in found if isinstance(node, kinds)]
    # Neighbours of one file are joined: most docstrings alone are a line.
    chunk = ""
    for text in dict.fromkeys(texts):
        chunk = f"{chunk}\n\n{text}".strip()
        if len(chunk) >= 1200:
            yield chunk
            chunk = ""
    yield chunk
