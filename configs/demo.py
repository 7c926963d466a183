"""Demo: a whole ChatGPT's life on a laptop, without network or GPU, in minutes.

  bash speedrun.sh                     # picks this recipe where there is no GPU

The modern recipe, small: human small talk and Python's documentation, 11 MB of text. What comes out
speaks in sentences and knows nothing. Measured times and scores: dev/BENCHMARKS.md.
"""

from ml_collections import ConfigDict

from configs import default, gpt2

PROMPTS = (
    "Hi! How are you?",
    '"What did you do today?"\n"',
    "My favorite food is",
    "I think that",
    "The function returns",
)


def get_config() -> ConfigDict:
    c = gpt2.modern(default.get_config())
    c.run.name = "demo"
    c.tokenizer.vocab_size = 4_096
    c.data.name = "demo"
    c.data.num_lanes = 4
    c.data.packing = "stream"  # best_fit would cut two fifths of so little text away
    c.model.depth = 4
    c.model.aspect_ratio = 48
    c.model.head_dim = 64
    c.model.seq_len = 256
    c.optim.scale_by_batch = False  # its reference, half a million tokens a step, is too far away
    c.base.num_steps = 400
    c.base.total_batch_tokens = 8_192
    c.base.device_batch_size = 32
    c.base.eval_every = 100
    c.base.sample_every = 200
    c.base.save_every = 100
    c.eval.val_tokens = 262_144
    c.eval.prompts = PROMPTS
    c.eval.sample_tokens = 48
    c.eval.trigram_tokens = 4_000_000  # more than there is: all of it
    return c
