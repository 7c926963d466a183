"""Pretraining: the base model learns from text."""

from nanochat_jax import recipe
from nanochat_jax.data import hub
from nanochat_jax.data.lanes import DataOrder
from nanochat_jax.data.pipeline import TrainBatches
from nanochat_jax.data.sources import Corpus
from nanochat_jax.stages.evals import make_answers, make_core, text_bpb
from nanochat_jax.stages.run import Run
from nanochat_jax.stages.text import run_data, run_tokenizer
from nanochat_jax.stages.train import Stage
from nanochat_jax.train.loop import Evaluation
from nanochat_jax.train.memory import require_memory
from nanochat_jax.train.state import TrainState, abstract_state, create_state


class Base(Stage):
    name = "base"

    def __init__(self, run: Run):
        config, b, d = run.config, run.config.base, run.config.data
        super().__init__(run)
        self.use_rows(recipe.rows_per_step(config, run.row_shards))
        self.widest = run.model.seq_len
        self.use_optimizer(b.num_steps)
        # Checked first: the download takes hours.
        require_memory(abstract_state(self.owners, self.tx), run.mesh)
        self.tokenizer = run_tokenizer(config)
        train_paths, val_path = run_data(config)
        keys = {"packing": d.packing, "buffer_docs": d.buffer_docs, "num_lanes": d.num_lanes}
        order = DataOrder(Corpus(train_paths), self.tokenizer, run.model.seq_len, **keys)
        made = {"batch_rows": self.rows, "prefetch": d.prefetch_batches}
        self.batches = TrainBatches(order, **made, **run.process)
        bpb = text_bpb(run, self.tokenizer, val_path)
        prompts, new_tokens = config.eval.prompts, config.eval.sample_tokens
        samples = make_answers(run, self.tokenizer, prompts, new_tokens, in_chat=False)
        self.evaluations = [
            Evaluation("bpb", b.eval_every, lambda params: {"val_bpb": bpb(params)}),
            Evaluation("samples", b.sample_every, lambda params: {"samples": samples(params)}),
        ]
        if config.eval.core and b.core_every:
            bundle = hub.eval_bundle(config.eval.core_dir)
            core = make_core(run, self.tokenizer, bundle, config.eval.core_loop_per_task)
            self.evaluations.append(Evaluation("core", b.core_every, core))

    def init(self, target: TrainState) -> TrainState:
        return create_state(self.owners, self.tx, self.run.config.run.seed)
