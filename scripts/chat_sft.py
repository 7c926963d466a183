"""Supervised fine-tuning: the model learns to say what the assistant says.

  python scripts/chat_sft.py --config=configs/d20.py

Starts from mid-training (from the base model where the recipe has none), or continues where it was.
Ctrl-C or SIGTERM saves and exits with status 75.
"""

from nanochat_jax.config import run_stage
from nanochat_jax.stages.chat import SFT
from nanochat_jax.stages.train import train_stage

if __name__ == "__main__":
    run_stage(lambda config: train_stage(config, SFT), __doc__)
