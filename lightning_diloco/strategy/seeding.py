"""Random numbers of the learners of one job.

A job of one learner must draw exactly what a plain Trainer draws, so there nothing is touched. With several learners all start from the
same state (module initialization in hooks is then equal everywhere, and cheap to found), and every learner but the first gets its own
stream before training, or dropout and augmentation would be the same everywhere. A restarted learner gets a stream of its own too.
"""

from __future__ import annotations

import os
import random

import numpy as np
import torch

__all__ = ["reseed_learner"]

_LEARNER_STRIDE = 1_000_003
_LIFE_STRIDE = 7_919


def reseed_learner(learner_id: int, life: int) -> None:
    """Give this process the random stream of one life of one learner.

    The environment variable in which Lightning keeps the job's seed stays as it is: the distributed sampler reads it, and its
    permutation has to be the same for all learners.

    Args:
        learner_id: from 0.
        life: 0 for the first process of this learner, 1 after one restart.
    """
    if learner_id == 0 and life == 0:
        return
    given = os.environ.get("PL_GLOBAL_SEED")
    base = int(given) if given is not None else torch.initial_seed()
    seed = (base + _LEARNER_STRIDE * learner_id + _LIFE_STRIDE * life) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
