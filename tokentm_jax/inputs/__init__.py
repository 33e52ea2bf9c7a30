"""Inputs of models, one file per modality: how they are read, checked, hidden in part, and shown with a map."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
