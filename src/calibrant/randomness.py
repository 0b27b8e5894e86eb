"""Random generators from recorded seeds; the global random state is neither read nor changed."""

import numpy as np


def make_rng(seed: int, *path: int | str) -> np.random.Generator:
    """A generator for one purpose, named by ``path`` (for example ``("row", 3)``), independent of all others."""
    words = [seed]
    for part in path:
        words.append(part if isinstance(part, int) else int.from_bytes(part.encode(), "little"))
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
