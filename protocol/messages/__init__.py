"""Every message on the wire, a file for each link or two. No other folder defines a struct that crosses a process.

Frozen, slotted dataclasses; `protocol/codec.py` turns them into frames and back, strictly. Arrays are numpy,
little-endian, read-only after decoding. `WIRE.md` says which link carries what, in which order.

Names of things: a *key* is a frontend's (or client's) own number for a sequence, unique within that sender;
a *number* is the scheduler's own number for it, unique within an engine; a *slot* is a row of the executor's
persistent batch.
"""

from __future__ import annotations

from .arrays import Float32, Int32, Int64, TopLogprobs
from .clients import (
    Accepted,
    Cancel,
    ClientHello,
    Distribution,
    FrontendFigures,
    Generate,
    GetFigures,
    Refused,
    ServerHello,
)
from .control import Fatal, Heartbeat, Hello, Progress, Ready, Shutdown
from .requests import (
    Abort,
    Attach,
    EngineInfo,
    GetStats,
    GetTimeline,
    SequenceTimeline,
    Stats,
    StopFound,
    Submit,
    Timeline,
    TimelineSpan,
)
from .steps import Admit, ExecutorReady, PromptLogprobs, RowFailed, Step, StepResult
from .text import Deliver, OpenStream, StreamEnd, StreamPromptLogprobs, TextBatch
from .version import PROTOCOL_VERSION

__all__ = [
    "PROTOCOL_VERSION",
    "Abort",
    "Accepted",
    "Admit",
    "Attach",
    "Cancel",
    "ClientHello",
    "Deliver",
    "Distribution",
    "EngineInfo",
    "ExecutorReady",
    "Fatal",
    "Float32",
    "FrontendFigures",
    "Generate",
    "GetFigures",
    "GetStats",
    "GetTimeline",
    "Heartbeat",
    "Hello",
    "Int32",
    "Int64",
    "Message",
    "OpenStream",
    "Progress",
    "PromptLogprobs",
    "Ready",
    "Refused",
    "RowFailed",
    "SequenceTimeline",
    "ServerHello",
    "Shutdown",
    "Stats",
    "Step",
    "StepResult",
    "StopFound",
    "StreamEnd",
    "StreamPromptLogprobs",
    "Submit",
    "TextBatch",
    "Timeline",
    "TimelineSpan",
    "TopLogprobs",
]

Message = (
    Attach
    | Submit
    | Abort
    | GetStats
    | GetTimeline
    | StopFound
    | EngineInfo
    | Stats
    | Timeline
    | Step
    | ExecutorReady
    | StepResult
    | Deliver
    | TextBatch
    | ClientHello
    | ServerHello
    | Generate
    | Cancel
    | Accepted
    | Refused
    | GetFigures
    | FrontendFigures
    | Hello
    | Progress
    | Ready
    | Heartbeat
    | Fatal
    | Shutdown
)
