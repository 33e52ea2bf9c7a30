"""Vision Transformers, their weights, and what they show of a forward and a backward pass."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
