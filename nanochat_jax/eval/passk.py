"""pass@k: how often at least one of k answers to a problem is right.

Two estimates from n >= k answers to each problem: of the first k, as upstream reports, and the mean
over all choices of k (arXiv 2107.03374): the same expectation, less noise.
"""

from math import comb

import numpy as np


def pass_at_k(correct: np.ndarray) -> list[float]:
    """For k = 1..n, the share of problems that the first k answers solve. correct: bool [P, n]."""
    return np.logical_or.accumulate(correct, axis=1).mean(axis=0).tolist()


def pass_at_k_unbiased(correct: np.ndarray) -> list[float]:
    """For k = 1..n, the mean of 1 - C(n - c, k) / C(n, k), c of a problem's answers being right."""
    n, right = correct.shape[1], np.sum(correct, axis=1).tolist()
    solved = [[1 - comb(n - c, k) / comb(n, k) for c in right] for k in range(1, n + 1)]
    return [float(np.mean(of_k)) for of_k in solved]
