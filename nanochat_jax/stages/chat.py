"""Mid-training and SFT: conversations of a mixture of tasks. They differ in their sections only."""

from typing import Any

from nanochat_jax import hardware, recipe
from nanochat_jax.common import locked, log
from nanochat_jax.data import conversations as conv
from nanochat_jax.stages.evals import validation_bpb
from nanochat_jax.stages.run import Run, finished_parent
from nanochat_jax.stages.text import run_tokenizer
from nanochat_jax.stages.train import Stage
from nanochat_jax.tasks.registry import Mixture, file_stamps
from nanochat_jax.train.loop import Evaluation


class _Chat(Stage):
    def __init__(self, run: Run):
        s = run.config[self.name]
        self.parent = finished_parent(run, self.name)
        super().__init__(run)
        self.use_rows(s.batch_rows or recipe.rows_per_step(run.config, run.row_shards))
        self.tokenizer = run_tokenizer(run.config)
        self.batches = batches = self._conversations(s.mixture, s.packing, self.rows, "train")
        self.use_optimizer(min(s.num_steps or len(batches), len(batches)))
        log(f"{self.name}: {len(batches):,} batches of {self.rows:,} rows")
        self.widest = max(batches.width(number) for number in range(self.num_steps))
        self.evaluations = []
        if s.val_mixture:
            bpb = validation_bpb(run, self.tokenizer, self._val_batches())
            score = Evaluation("bpb", s.eval_every, lambda params: {"val_bpb": bpb(params)})
            self.evaluations.append(score)

    def _conversations(self, specs, packing: str, rows: int, split: str) -> conv.ChatBatches:
        """The batches of a mixture, rendered once and kept in the stage's folder."""
        data, seq_len = self.run.config.data, self.run.model.seq_len
        folder = self.run.dir / self.name / f"{split}_conversations"
        rendering = {"max_tokens": seq_len + 1, "train_on": self.section.train_on}
        made_of = {"mixture": list(specs), "files": file_stamps(specs, data.persona)}
        made_of |= {"task_dir": data.task_dir, "tokenizer": self.tokenizer.sha256(), **rendering}

        def make() -> conv.Rendered:
            mixed = Mixture(specs, task_dir=data.task_dir, persona=data.persona)
            log(f"{self.name}: rendering {len(mixed):,} conversations to {split} on")
            for spec, count in mixed.counts().items():
                log(f"  {count:>9,} {spec}")
            return conv.render(mixed, self.tokenizer, workers=hardware.usable_cpus(), **rendering)

        with locked(folder / "conversations.json"):
            rendered = conv.load_or_render(folder, made_of, make)
        counts = ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in rendered.counts.items())
        log(f"{self.name}: to {split} on: {counts}")
        shape = {"pad_id": self.tokenizer.bos_id, "seq_len": seq_len, "batch_rows": rows}
        made = {"packing": packing, "prefetch": data.prefetch_batches}
        return conv.ChatBatches(rendered, **shape, **made, **self.run.process)

    def _val_batches(self) -> list[dict[str, Any]]:
        """The first eval.val_tokens of the stage's validation mixture."""
        e = self.run.config.eval
        rows = e.device_batch_size * self.run.row_shards
        # One shape: where training has one conversation a row, validation packs them.
        packing = "stream" if self.section.packing == "stream" else "best_fit"
        batches = self._conversations(self.section.val_mixture, packing, rows, "validate")
        wanted = max(1, e.val_tokens // (rows * self.run.model.seq_len))
        return [batches[number] for number in range(min(wanted, len(batches)))]


class Mid(_Chat):
    name = "mid"


class SFT(_Chat):
    name = "sft"
