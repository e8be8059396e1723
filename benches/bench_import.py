"""asv: what a user pays before the first call."""

from __future__ import annotations

import os
import subprocess
import sys
import time


class Import:
    """`import tilewise` in a fresh process, beyond what NumPy costs; and the size of the extension."""

    timeout = 60.0

    def track_import(self) -> float:
        code = "import time, numpy; start = time.perf_counter(); import tilewise; print(time.perf_counter() - start)"
        return min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)) * 1e3

    track_import.unit = "ms"  # type: ignore[attr-defined]

    def track_process(self) -> float:
        start = time.perf_counter()
        subprocess.check_call([sys.executable, "-c", "import tilewise"])
        return (time.perf_counter() - start) * 1e3

    track_process.unit = "ms"  # type: ignore[attr-defined]

    def track_extension_size(self) -> float:
        from tilewise import _core

        return os.path.getsize(str(_core.__file__)) / 2**20

    track_extension_size.unit = "MiB"  # type: ignore[attr-defined]
