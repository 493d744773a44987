"""The version of the wire: what both ends of every link must agree on."""

from __future__ import annotations

# (major, minor): a different major is refused at the hello; a newer minor may add fields, which are ignored.
PROTOCOL_VERSION = (1, 0)
