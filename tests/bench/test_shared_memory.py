import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.shared_memory import SHARED_MEMORY, segments_of

HOLDER = """
import mmap, sys
with open(sys.argv[1], "w+b") as file:
    file.truncate(mmap.PAGESIZE)
    memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def segment() -> Iterator[Path]:
    path = SHARED_MEMORY / f"penstock-test-{uuid.uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)


def test_a_segment_is_of_the_process_that_uses_it_and_of_nobody_else(segment: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(segment)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mapped\n"
        assert segments_of([holder.pid]) == {segment}
        assert segment not in segments_of([os.getpid()])
        assert segment in segments_of([os.getpid(), holder.pid])
        holder.kill()
    assert segment.exists(), "it outlives who was killed"
    assert segments_of([holder.pid]) == set()
