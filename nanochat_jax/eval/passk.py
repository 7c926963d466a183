"""pass@k: how often at least one of k answers to a problem is right.

Two estimates of it from n >= k answers each, correct [P problems, n answers]:

  pass_at_k           are any of the first k right? What upstream reports.
  pass_at_k_unbiased  the mean over all choices of k, 1 - C(n - c, k) / C(n, k) with c right answers
                      (arXiv 2107.03374): the same expectation, less noise.
"""

from math import comb

import numpy as np


def pass_at_k(correct: np.ndarray) -> list[float]:
    """For k = 1..n, the share of problems that the first k answers solve. correct: bool [P, n]."""
    return np.logical_or.accumulate(correct, axis=1).mean(axis=0).tolist()


def pass_at_k_unbiased(correct: np.ndarray) -> list[float]:
    """For k = 1..n, the expected share of problems that k answers solve. correct: bool [P, n]."""
    n = correct.shape[1]
    right = np.sum(correct, axis=1).tolist()

    def solved(k: int) -> float:
        return float(np.mean([1 - comb(n - c, k) / comb(n, k) for c in right]))

    return [solved(k) for k in range(1, n + 1)]
