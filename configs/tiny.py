"""Tiny: every stage in seconds, for tests and for trying things. Its text makes no sense.

bash speedrun.sh --config=configs/tiny.py
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.run.name = "tiny"
    c.tokenizer.vocab_size = 512
    c.tokenizer.train_chars = 300_000
    c.data.name = "demo"
    c.data.num_lanes = 2
    c.data.buffer_docs = 64
    c.model.depth = 2
    c.model.aspect_ratio = 16
    c.model.head_dim = 16
    c.model.seq_len = 64
    c.base.num_steps = 40
    c.base.total_batch_tokens = 1_024
    c.base.device_batch_size = 8
    c.base.eval_every = 10
    c.base.sample_every = 20
    c.base.save_every = 5
    c.eval.val_tokens = 4_096
    c.eval.device_batch_size = 8
    c.eval.sample_tokens = 8
    c.eval.trigram_tokens = 40_960
    return c
