"""Greedy maximum coverage: lazy equals full, the pool is a pool, k-centre's radius shrinks, herding keeps the mean."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrant.calibration.selection.cola import closest_to_centres
from calibrant.calibration.selection.coverage import SetFamily, greedy_cover, pooled_cover
from calibrant.calibration.selection.spread import herding, k_centre

UNIVERSE = 24
families = st.lists(st.frozensets(st.integers(0, UNIVERSE - 1)), min_size=1, max_size=30)


def family_of(sets: list[frozenset[int]], universe: int = UNIVERSE) -> SetFamily:
    family = SetFamily(universe)
    for one in sets:
        family.append(np.array(sorted(one), dtype=np.int64), np.array([len(one)]))
    return family


def full_greedy(sets: list[frozenset[int]], count: int, candidates=None) -> list[int]:
    """Every gain looked at for every pick."""
    covered: set[int] = set()
    left, chosen = list(range(len(sets))), []
    for _ in range(min(count, len(sets))):
        looked = left if candidates is None else candidates(left)
        best = max(looked, key=lambda i: (len(sets[i] - covered), len(sets[i]), -i))
        covered |= sets[best]
        left.remove(best)
        chosen.append(best)
    return chosen


@settings(max_examples=300, deadline=None)
@given(families, st.integers(1, 30))
def test_lazy_greedy_is_full_greedy(sets: list[frozenset[int]], count: int) -> None:
    picks = greedy_cover(family_of(sets), count)
    assert picks.chosen.tolist() == full_greedy(sets, count)
    gains = np.diff(picks.covered, prepend=0)
    assert (gains >= 0).all()
    assert (np.diff(gains) <= 0).all()
    assert picks.covered[-1] == len(frozenset().union(*(sets[i] for i in picks.chosen)))


@pytest.mark.parametrize("size", [3, 40])
def test_where_every_old_gain_is_wrong(size: int) -> None:
    """Nested and equal sets: each pick makes all others worthless, or none of them."""
    nested = [frozenset(range(i + 1)) for i in range(size)]
    disjoint = [frozenset({i}) for i in range(size)]
    for sets in (nested, disjoint, nested + disjoint, [frozenset(range(size))] * size, [frozenset()] * size):
        assert greedy_cover(family_of(sets, size), 2 * size).chosen.tolist() == full_greedy(sets, 2 * size)


@settings(max_examples=50, deadline=None)
@given(families, st.integers(1, 10), st.integers(1, 12), st.integers(0, 5))
def test_the_pool_is_drawn_from_what_is_left(sets: list[frozenset[int]], count: int, pool: int, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def candidates(left: list[int]) -> list[int]:
        return left if len(left) <= pool else [left[i] for i in rng.choice(len(left), pool, replace=False)]

    expected = full_greedy(sets, count, candidates)
    assert pooled_cover(family_of(sets), count, pool, np.random.default_rng(seed)).chosen.tolist() == expected


def test_a_pool_of_everything_is_exact() -> None:
    rng = np.random.default_rng(0)
    sets = [frozenset(rng.integers(0, 400, 20).tolist()) for _ in range(200)]
    assert (
        pooled_cover(family_of(sets, 400), 60, 200, rng).chosen.tolist()
        == greedy_cover(family_of(sets, 400), 60).chosen.tolist()
    )


def test_wide_universes_and_no_sets_at_all() -> None:
    wide = [frozenset({70_000, 1}), frozenset({65_536, 2, 3})]
    assert greedy_cover(family_of(wide, 70_001), 2).chosen.tolist() == [1, 0]
    assert greedy_cover(SetFamily(5), 3).chosen.tolist() == []


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 9))
def test_k_centre_is_greedy_and_its_radius_never_grows(points: int, count: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).integers(0, 4, (points, 3)).astype(np.float32)
    chosen, radii = k_centre(vectors, count, first=seed % points)
    assert len(chosen) == len(set(chosen)) == min(count, points)
    assert (np.diff(radii) <= 0).all()
    for step, radius in enumerate(radii, start=1):
        distances = ((vectors[:, None] - vectors[chosen[:step]]) ** 2).sum(-1).min(1)
        left = np.setdiff1d(np.arange(points), chosen[:step])
        assert radius == pytest.approx(distances[left].max() if len(left) else 0)


def test_herding_keeps_the_mean() -> None:
    vectors = np.random.default_rng(1).standard_normal((400, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chosen = herding(vectors, 64)
    assert len(set(chosen)) == 64
    error = np.linalg.norm(vectors[chosen].mean(0) - vectors.mean(0))
    random = np.random.default_rng(2)
    others = [np.linalg.norm(vectors[random.permutation(400)[:64]].mean(0) - vectors.mean(0)) for _ in range(50)]
    assert error < 0.3 * min(others)


def test_cola_takes_one_of_every_cluster_and_never_a_duplicate_twice() -> None:
    rng = np.random.default_rng(0)
    centres = 100 * rng.standard_normal((6, 5))
    vectors = np.repeat(centres, 10, axis=0) + rng.standard_normal((60, 5))
    chosen, clusters = closest_to_centres(vectors, 6, np.random.default_rng(1))
    assert sorted(index // 10 for index in chosen) == list(range(6))
    assert clusters == 6
    doubled = np.concatenate([centres, centres, centres])
    chosen, _ = closest_to_centres(doubled, 6, np.random.default_rng(1))
    assert len({index % 6 for index in chosen}) == 6
    chosen, _ = closest_to_centres(doubled, 10, np.random.default_rng(1))
    assert len(set(chosen)) == 10
