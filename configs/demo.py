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
MID_MIXTURE = (
    "chitchat train[:2000]",
    "identity train[:500]",
    "arithmetic train[:1500]",
    "spelling_bee train[:3000]",
    "simple_spelling train[:3000]",
)
SFT_MIXTURE = (
    "chitchat train[2000:2500]",
    "identity train[500:]",
    "arithmetic train[1500:2000]",
    "spelling_bee train[3000:6000]",
    "simple_spelling train[3000:8000]",
)


def get_config() -> ConfigDict:
    c = gpt2.modern(default.get_config())
    c.run.name = "demo"
    c.tokenizer.vocab_size = 4_096
    c.data.name = "demo"
    c.data.num_lanes = 4
    c.data.packing = "stream"  # best_fit would cut two fifths of so little text away
    c.model.update(depth=4, aspect_ratio=48, head_dim=64, seq_len=256)
    c.optim.scale_by_batch = False  # its reference, half a million tokens a step, is too far away
    c.base.num_steps = 400
    c.base.total_batch_tokens = 8_192
    c.base.device_batch_size = 32
    c.base.eval_every = c.base.save_every = 100
    c.base.sample_every = 200
    c.mid.mixture = MID_MIXTURE
    c.mid.val_mixture = ("chitchat test", "arithmetic test", "spelling_bee test")
    c.mid.packing = "best_fit"
    c.mid.embed_lr = c.optim.embed_lr
    c.mid.unembed_lr = c.rl.unembed_lr = c.optim.unembed_lr
    c.mid.warm_start = True
    c.mid.eval_every = c.mid.save_every = 50
    c.sft.mixture = SFT_MIXTURE
    c.sft.val_mixture = c.mid.val_mixture
    c.sft.device_batch_size = 32
    c.sft.lr_frac = 0.5
    c.sft.eval_every = c.sft.save_every = 50
    c.rl.task = "arithmetic train"
    c.rl.val_task = "arithmetic test"
    c.rl.num_steps = 20
    c.rl.questions_per_step = 64
    c.rl.samples = 8
    c.rl.max_new_tokens = 80
    c.rl.device_batch_size = 64
    c.rl.lr_frac = 0.2
    c.rl.embed_lr = 0.02  # so few rewards move rare tokens at random
    c.rl.scalar_frac = 0.0
    c.rl.eval_every = c.rl.save_every = 10
    c.rl.eval_questions = 256
    c.rl.eval_samples = 4
    c.eval.core = False
    c.eval.chat_tasks = ("arithmetic test", "spelling_bee test", "simple_spelling test")
    c.eval.chat_problems = 512
    c.eval.chat_max_new_tokens = 96
    c.eval.val_tokens = 262_144
    c.eval.prompts = PROMPTS
    c.eval.sample_tokens = 48
    return c
