"""The conversations that the demo learns from fit its context, all but a few."""

import pytest

from nanochat_jax import config
from nanochat_jax.tasks.chitchat import ChitChat
from nanochat_jax.tasks.registry import mixture
from nanochat_jax.tokenizer import bpe
from nanochat_jax.tokenizer.chat import render_whole

DEMO = config.load(config.CONFIGS / "demo.py")
SPECS = sorted({*DEMO.mid.mixture, *DEMO.mid.val_mixture, *DEMO.sft.mixture, *DEMO.sft.val_mixture})
CHITCHAT = [spec for spec in SPECS if spec.startswith("chitchat ")]
GENERATED = [spec for spec in SPECS if spec not in CHITCHAT]
SAMPLE = 200  # conversations of each spec


def frac_too_long(spec, tokenizer):
    conversations = mixture([spec])[:SAMPLE]  # it is shuffled: these are a sample
    lengths = [len(render_whole(tokenizer, conversation)[0]) for conversation in conversations]
    assert len(lengths) >= 100 and min(lengths) > 10
    return sum(length > DEMO.model.seq_len + 1 for length in lengths) / len(lengths)


@pytest.mark.parametrize("spec", GENERATED)
def test_generated_conversations_fit_the_context(spec, goldens):
    tokenizer = bpe.Tokenizer.load(goldens)
    assert tokenizer.vocab_size < DEMO.tokenizer.vocab_size  # needs more tokens than the demo's
    assert frac_too_long(spec, tokenizer) == 0


@pytest.mark.slow
def test_small_talk_fits_the_context():
    """With a tokenizer that, like the demo's, has learned from the conversations to train on."""
    pytest.importorskip("chitchat_dataset")
    texts = ("\n".join(piece) for piece in ChitChat("train").pieces)
    tokenizer = bpe.train(texts, DEMO.tokenizer.vocab_size)
    assert {spec: frac_too_long(spec, tokenizer) for spec in CHITCHAT} == {
        spec: pytest.approx(0, abs=0.02) for spec in CHITCHAT
    }
