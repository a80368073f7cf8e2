"""fanin: extreme multi-label text classification whose output layer is sparse from the first step to the last."""

import os

__version__ = "0.1.0"

# libgomp's threads spin for milliseconds at the end of every loop. Beside other work on the same cores that is time which the
# others lack, the slowest thread too: the start took ten minutes instead of one. It reads this once, before torch is there.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
