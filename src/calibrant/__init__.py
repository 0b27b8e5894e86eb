"""Calibration data and post-training compression for language models.

``import calibrant as cb`` gives the whole public API, which ``dir(cb)`` lists. ``__init__.pyi`` is the one table of it:
``__all__``, the lazy loading and the types come from there. Heavy libraries load when a name is first used.
"""

import os

import lazy_loader

# Threads that spin while they wait multiply a run's time once another program, or another team of threads (Numba's
# beside torch's), needs a core. OpenMP reads this when torch loads it; a user's own setting stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
