"""From the command line to an answer over HTTP."""

import re
import sys

import httpx
import pytest

from nanochat_jax.common import UserError
from nanochat_jax.config import CONFIGS
from nanochat_jax.serve import server
from scripts import chat_web as script
from scripts.bench.infer import generate_greedy
from tests.inference.test_checkpoint import NAME, RECIPE, trained  # noqa: F401
from tests.serve.conftest import listening


@pytest.fixture
def run(trained, monkeypatch, capfd):  # noqa: F811
    """run(*arguments, then=talk): what talk(url) returns while the server listens, and the log."""

    def run(*argv, then=lambda url: None):
        said = []

        def serve(app, pool, sock, greeting):
            print(greeting)
            with listening(app, pool, sock) as url:
                said.append(then(url))

        monkeypatch.setattr(server, "serve", serve)
        monkeypatch.chdir(CONFIGS.parent)
        argv = ["chat_web.py", *RECIPE, "--port=0", "--engines=1", "--slots=2", *argv]
        monkeypatch.setattr(sys, "argv", argv)
        assert script.main() == 0
        return said[0], capfd.readouterr().out

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, options, tools",
    [("sft", [], ["calculator", "none"]), ("base", ["--stage=base"], ["none"])],
)
def test_a_stage_of_a_run_is_served(run, trained, tiny_tokenizer, stage, options, tools):  # noqa: F811
    """What full forward passes say, over HTTP."""
    body = {"prompt": "How many boats?", "temperature": 0, "max_tokens": 12}

    def talk(url):
        card = httpx.get(f"{url}/v1/models").json()["data"][0]
        assert httpx.get(f"{url}/report").status_code == 200
        assert httpx.get(url).headers["content-type"].startswith("text/html")
        return card, httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()

    (card, answer), log = run(*options, then=talk)
    assert (card["id"], card["step"], card["tools"]) == (f"{NAME}-{stage}", 9, tools)
    model, params = trained
    bos = tiny_tokenizer.bos_id
    [ids] = generate_greedy(model, params[stage], [tiny_tokenizer.encode(body["prompt"], True)], 12)
    stops = [bos] if stage == "base" else [bos, tiny_tokenizer.special_id("<|assistant_end|>")]
    ids = ids[: next((i for i, token in enumerate(ids) if token in stops), 12)]
    assert answer["choices"][0]["text"] == tiny_tokenizer.decode([id for id in ids if id < bos])
    assert re.search(rf"{NAME}, stage {stage}[\s\S]*ready after .* http://127.0.0.1:\d+", log)


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--stage=rl"], "checkpoints of base, sft, expected of rl"),
        (["--host=0.0.0.0"], "api-key"),
        (["--port=70000"], "--port"),
        (["--slots=0"], "--slots got 0"),
        (["--timeout-secs=0"], "--timeout-secs"),
        (["--engines=1000"], "--engines"),
        (["--max-len=100000"], "--max-len"),
        (["--tool=hammer"], "hammer"),
        (["--temperature=1"], "--temperature=1"),
    ],
)
def test_what_cannot_be_done_is_told(run, argv, named):
    with pytest.raises(UserError, match=f"^[^\n]*{named}"):
        run(*argv)
