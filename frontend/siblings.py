"""The other frontends of the same port, as one of them sees them: asked for their figures at each scrape.

The kernel gives a connection to any of the frontends, so one that is asked for /metrics must answer for all. Owns the
questions under way and the last answer of each; must not know HTTP or what is counted. Speaks to the others over their
`client` links, as any native client does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial

from ..protocol.channel import AsyncReader, ZmqSocket
from ..protocol.errors import ProtocolError
from ..protocol.messages import FrontendFigures, GetFigures, Message

log = logging.getLogger(__name__)


class Siblings:
    """`links`: a DEALER to each of the others, by name. Belongs to the running event loop."""

    def __init__(self, links: Mapping[str, ZmqSocket]) -> None:
        self._readers = {name: AsyncReader(socket, partial(self._on_message, name)) for name, socket in links.items()}
        self._last: dict[str, FrontendFigures] = {}
        self._asked: dict[tuple[str, int], asyncio.Future[None]] = {}
        self._token = 0

    async def figures(self, timeout: float) -> list[FrontendFigures]:
        """What each of the others has counted. Of one that does not answer within `timeout` seconds, what it last
        said: a counter must not fall."""
        if not self._readers:
            return []
        self._token += 1
        token, loop = self._token, asyncio.get_running_loop()
        asked = {(name, token): loop.create_future() for name in self._readers}
        self._asked |= asked
        try:
            for reader in self._readers.values():
                reader.send(GetFigures(token=token))
            await asyncio.wait(asked.values(), timeout=timeout)
        finally:
            for question, answer in asked.items():
                del self._asked[question]
                if not answer.done():
                    log.warning("%s gave no figures within %.1f s: taking its last ones", question[0], timeout)
                    answer.cancel()
        return list(self._last.values())

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _on_message(self, name: str, sender: str, message: Message | ProtocolError) -> None:
        if not isinstance(message, FrontendFigures):
            log.error("unexpected from %s: %r", name, message)
            return
        self._last[name] = message
        waiting = self._asked.get((name, message.token))
        if waiting is not None and not waiting.done():
            waiting.set_result(None)
