"""In which order the examples of a mixture of tasks are seen.

Every example of every task is listed once, task by task, and the list is shuffled with a fixed
seed: the order depends on the sizes alone. A task that should weigh more is listed more than once.
"""

import random
from collections.abc import Sequence

SHUFFLE_SEED = 42


def mixture_order(tasks: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(task, index) pairs of a mixture, given the example indices that each task takes part with.

    A task of n examples takes part with range(n), a slice of it with range(n)[start:stop:step].
    """
    pairs = [(task, index) for task, indices in enumerate(tasks) for index in indices]
    random.Random(SHUFFLE_SEED).shuffle(pairs)
    return pairs
