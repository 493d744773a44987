"""What a kernel raises that can't be compiled for a device, or launched there. Importing this needs triton."""

from __future__ import annotations

import subprocess

from triton.errors import TritonError

# The compiler's own, the driver's, and those of the programs that the compiler runs.
LAUNCH_FAILURES = (TritonError, RuntimeError, OSError, subprocess.SubprocessError)
