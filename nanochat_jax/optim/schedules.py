"""Schedules as functions of the step: a Python int (computed in float64) or a traced array."""

import jax
import jax.numpy as jnp
import numpy as np


def lr_multiplier(step, *, num_steps, warmup_steps, warmdown_frac, final_frac):
    """(step+1)/warmup_steps, then 1; over the last warmdown_frac of the steps to final_frac."""
    xp = _namespace(step)
    warmdown_steps = round(warmdown_frac * num_steps)
    left = (num_steps - step) / max(warmdown_steps, 1)
    falling = left + (1 - left) * final_frac
    multiplier = xp.where(step <= num_steps - warmdown_steps, 1.0, falling)
    return xp.where(step < warmup_steps, (step + 1) / max(warmup_steps, 1), multiplier)


def muon_momentum(step, *, num_steps, warmdown_frac, start, peak, end, warmup_steps):
    """start rising to peak over warmup_steps; falling to end while the learning rate warms down."""
    xp = _namespace(step)
    warmdown_steps = round(warmdown_frac * num_steps)
    risen = step / max(warmup_steps, 1)
    fallen = (step - (num_steps - warmdown_steps)) / max(warmdown_steps, 1)
    rising = (1 - risen) * start + risen * peak
    falling = (1 - fallen) * peak + fallen * end
    return xp.where(step < warmup_steps, rising, xp.where(fallen >= 0, falling, peak))


def cosine_to_zero(step, *, num_steps: int):
    """1 at the first step, 0 after the last: the course of Muon's weight decay."""
    return 0.5 * (1 + _namespace(step).cos(np.pi * step / num_steps))


def _namespace(step):
    return jnp if isinstance(step, jax.Array) else np
