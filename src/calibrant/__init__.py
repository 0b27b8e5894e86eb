"""Calibration data and post-training compression for language models.

``import calibrant as cb`` gives the whole public API, which ``dir(cb)`` lists. ``__init__.pyi`` is the one table of it:
``__all__``, the lazy loading and the types come from there. Heavy libraries load when a name is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
