"""An actor without work, for tests of the supervisor: `stub_actor.py BEHAVIOUR ROLE RUN_DIR`."""

import os
import signal
import sys
import time
from pathlib import Path

from fast_inference.launch.child import die_with_parent
from fast_inference.launch.rundir import read_card
from fast_inference.protocol.actor import Control
from fast_inference.protocol.channel import Wire
from fast_inference.protocol.endpoints import Endpoints
from fast_inference.protocol.errors import StartupError
from fast_inference.protocol.messages import Hello


def main(behaviour: str, role: str, run_dir: str) -> int:
    die_with_parent(read_card(Path(run_dir)).pid)
    if behaviour == "dies":
        print("no such thing as a model", file=sys.stderr)
        return 3
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wire = Wire()
    control = Control(wire, Endpoints(run_dir), role)
    if behaviour == "foreign":
        control.socket.send(Hello(actor=role, pid=os.getpid(), version_major=99))
    if behaviour == "fatal":
        control.fatal(StartupError("the model needs 9 GiB, 1 GiB is free: take a smaller one"))
        wire.close()
        return 1
    control.progress("working", 1, 2)
    if behaviour != "hangs":
        control.ready(blocks=7)
    started = time.monotonic()
    while True:
        wire.wait([control.socket], 0.05)
        order = control.turn()
        if behaviour == "dies later" and time.monotonic() - started > 0.3:
            print("a wire has come loose", file=sys.stderr)
            os._exit(4)
        if order is not None and behaviour not in ("deaf", "hangs"):
            print(f"{role} stops, drain {order.drain_seconds}", file=sys.stderr)
            wire.close()
            return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
