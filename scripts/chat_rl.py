"""Reinforcement learning: the model practises on questions whose answers can be graded.

  python scripts/chat_rl.py --config=configs/d20.py

Starts from the nearest earlier stage that the recipe has, or continues where it was. Ctrl-C or
SIGTERM saves and exits with status 75.
"""

from nanochat_jax.config import run_stage
from nanochat_jax.stages.rl import RL
from nanochat_jax.stages.train import train_stage

if __name__ == "__main__":
    run_stage(lambda config: train_stage(config, RL), __doc__)
