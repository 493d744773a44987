"""Models: the interface that the runner asks for (`base.py`), its makers, and `load_model`, which picks one."""

from .loader import load_model

__all__ = ["load_model"]
