"""Two `Deliver`s made one, for a detokenizer whose queue was full.

A pure function of messages; must not know requests or sockets.
"""

from __future__ import annotations

import numpy as np

from ..protocol.messages import Deliver
from ..protocol.ragged import concatenated


def merge(first: Deliver, second: Deliver) -> Deliver:
    """One message with the effect of `first`, then `second`."""
    return Deliver(
        opened=first.opened + second.opened,
        numbers=np.concatenate((first.numbers, second.numbers)),
        tokens=np.concatenate((first.tokens, second.tokens)),
        logprobs=concatenated(((0, first.logprobs), (len(first.numbers), second.logprobs))),
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        ended=first.ended + second.ended,
    )
