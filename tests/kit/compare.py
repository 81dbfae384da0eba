"""Comparisons that say how far two results are apart."""

import jax
import numpy as np


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def relative_rms(ours, theirs, least: float = 1e-30) -> float:
    """|ours - theirs| / |theirs| in root mean square, of which the latter counts as `least` at the least; NaN on either
    side never compares as small."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    return rms(ours - theirs) / max(rms(theirs), least)


def assert_close(ours, theirs, tolerance: float, what: str = "result", least: float = 1e-30) -> None:
    distance = relative_rms(ours, theirs, least)
    assert distance <= tolerance, f"{what}: relative RMS {distance:.3g} > {tolerance:g}"


def assert_trees_close(ours, theirs, tolerance: float) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(a, b, tolerance, jax.tree_util.keystr(path))


def assert_trees_equal(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))
