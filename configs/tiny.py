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
    tasks = ("arithmetic train[:64]", "simple_spelling train[:32]", "identity train[:16]")
    c.mid.mixture = c.sft.mixture = tasks
    c.mid.val_mixture = c.sft.val_mixture = ("arithmetic test[:8]",)
    c.mid.num_steps = c.sft.num_steps = 8
    c.mid.eval_every = c.sft.eval_every = 4
    c.mid.save_every = c.sft.save_every = 3
    c.mid.device_batch_size = 8
    c.sft.batch_rows = 16
    c.rl.task = "arithmetic train"
    c.rl.val_task = "arithmetic test"
    c.rl.num_steps = 4
    c.rl.questions_per_step = 4
    c.rl.samples = 4
    c.rl.pass_rows = 2
    c.rl.max_new_tokens = 8
    c.rl.slots = 16
    c.rl.eval_every = 2
    c.rl.eval_questions = 4
    c.rl.eval_samples = 2
    c.rl.save_every = 2
    c.eval.core = False
    c.eval.chat_tasks = ("arithmetic test", "simple_spelling test")
    c.eval.chat_problems = 8
    c.eval.chat_max_new_tokens = 8
    c.eval.chat_slots = 8
    c.eval.val_tokens = 4_096
    c.eval.device_batch_size = 8
    c.eval.sample_tokens = 8
    return c
