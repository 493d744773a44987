"""transformers on the same requests, as a process of its own: the measure that the engine is held against.

Owns the peer's process and the few messages with it; must not know how a peer does it (`peer_process.py`) and does
not import torch. The engine under test must not be running meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from records import Record
from workloads import Request

PEERS = ("transformers-cb", "transformers-generate")
ERROR_LINES = 20


@dataclass(frozen=True, slots=True)
class PeerJob:
    """What a peer has to do. `runs` are measured one after the other, after `warmup`.

    `batch`: how many requests `generate` takes at once. Once a run took longer than `long_run` seconds no further
    one is started.
    """

    peer: str
    model: str
    load_format: str
    dtype: str
    threads: int
    batch: int
    warmup: list[Request]
    runs: list[list[Request]]
    max_concurrency: int | None = None
    long_run: float = 60.0


def run_peer(job: PeerJob, progress: Callable[[str, int], None]) -> list[list[Record]]:
    """Run `job` in a fresh process; `progress(phase, finished requests)` is called as it goes.

    Returns the records of each run. Raises `RuntimeError` with the peer's last words if it fails.
    """
    script = Path(__file__).with_name("peer_process.py")
    results: list[list[Record]] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        with process:
            try:
                process.stdin.write(json.dumps(asdict(job)))
                process.stdin.close()
                for line in process.stdout:
                    event = json.loads(line)
                    if "records" in event:
                        results.append([Record(**record) for record in event["records"]])
                    else:
                        progress(event["phase"], event["done"])
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0:
            errors.seek(0)
            tail = "".join(errors.readlines()[-ERROR_LINES:])
            raise RuntimeError(f"{job.peer} failed with exit status {process.returncode}:\n{tail}")
    return results
