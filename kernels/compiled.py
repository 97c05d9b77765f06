"""What numba keeps of compiled code, kept true.

numba looks only at the file of a compiled function, not at the files whose code was compiled into it. After a change of
`exponential.py` a kernel in another file would go on with the old one, and two workers of one version compute different
bits.
"""

import contextlib
import os
from hashlib import blake2b
from pathlib import Path

_STAMP = "sources.digest"


def forget_stale(package: Path) -> bool:
    """Deletes the compiled code of a package unless it stems from the sources that lie there now; says whether it did.

    Called before anything of the package is compiled. Does nothing where the package cannot be written to: what is
    installed there is replaced as a whole.
    """
    cache = package / "__pycache__"
    digest = blake2b(digest_size=16)
    for source in sorted(package.glob("*.py")):
        digest.update(source.read_bytes())
    stamp = cache / _STAMP
    if (stamp.read_text() if stamp.exists() else "") == digest.hexdigest():
        return False
    with contextlib.suppress(OSError):
        cache.mkdir(exist_ok=True)
        for pattern in ("*.nbi", "*.nbc"):
            for file in cache.glob(pattern):
                file.unlink(missing_ok=True)
        # Named last, and at once: who dies before leaves the next one to delete again.
        written = cache / f"{_STAMP}.{os.getpid()}"
        written.write_text(digest.hexdigest())
        written.replace(stamp)
    return True
