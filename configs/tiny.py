"""Tiny: every stage in seconds, for tests and for trying things. Its text makes no sense.

bash speedrun.sh --config=configs/tiny.py
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.run.name = "tiny"
    c.tokenizer.update(vocab_size=512, train_chars=300_000)
    c.data.update(name="demo", num_lanes=2, buffer_docs=64)
    c.model.update(depth=2, aspect_ratio=16, head_dim=16, seq_len=64)
    c.base.update(num_steps=40, total_batch_tokens=1_024, device_batch_size=8)
    c.base.update(eval_every=10, sample_every=20, save_every=5)
    tasks = ("arithmetic train[:64]", "simple_spelling train[:32]", "identity train[:16]")
    for stage in (c.mid, c.sft):
        stage.update(mixture=tasks, val_mixture=("arithmetic test[:8]",))
        stage.update(num_steps=8, eval_every=4, save_every=3)
    c.mid.device_batch_size = 8
    c.sft.batch_rows = 16
    c.rl.update(task="arithmetic train", val_task="arithmetic test", num_steps=4)
    c.rl.update(questions_per_step=4, samples=4, pass_rows=2, max_new_tokens=8, slots=16)
    c.rl.update(eval_every=2, eval_questions=4, eval_samples=2, save_every=2)
    c.eval.core = False
    c.eval.update(val_tokens=4_096, device_batch_size=8, sample_tokens=8)
    c.eval.update(chat_tasks=("arithmetic test", "simple_spelling test"), chat_problems=8)
    c.eval.update(chat_max_new_tokens=8, chat_slots=8)
    return c
