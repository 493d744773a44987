"""The client library's two faces: `AsyncClient` for asyncio, `Client` for everyone else."""

from .async_client import AsyncClient
from .blocking_client import Client

__all__ = ["AsyncClient", "Client"]
