"""What is asked of the engine, and what comes back."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nanochat_jax.common import UserError
from nanochat_jax.inference.decode import MOST_BIASED
from nanochat_jax.inference.sampling import MOST_ALTERNATIVES

Top = list[tuple[int, float]]  # ids and their log probabilities, most likely first


@dataclass(frozen=True)
class Request:
    """What to continue, how far and how. UserError when a setting is out of range."""

    prompt: Sequence[int]  # ids, not empty
    max_new_tokens: int  # 0: only the prompt's log probabilities
    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0
    tool: str | None = None  # None: the engine's own choice; "none": it may call none
    presence_penalty: float = 0.0  # once for an id that the answer has already
    frequency_penalty: float = 0.0  # for every time
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = 0  # how many alternatives to name with each token
    prompt_logprobs: bool = False  # also how likely the prompt's own ids are

    def __post_init__(self):
        ranges: dict[str, tuple[float, float]] = {
            "max_new_tokens": (0 if self.prompt_logprobs else 1, math.inf),
            "temperature": (0, 1e6),
            "top_k": (0, math.inf),
            "seed": (0, math.inf),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
            "top_logprobs": (0, MOST_ALTERNATIVES),
        }
        for name, (least, most) in ranges.items():
            got = getattr(self, name)
            if not (least <= got <= most and got < math.inf):
                expected = f"{least} or more" if most == math.inf else f"{least} to {most}"
                raise UserError(f"{name} got {got}, expected {expected}; change it")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p got {self.top_p}, expected above 0, at most 1 (all); change it")
        values = self.logit_bias.values()
        if len(values) > MOST_BIASED or not all(-100 <= value <= 100 for value in values):
            raise UserError(
                f"logit_bias got {dict(self.logit_bias)}, expected at most {MOST_BIASED} ids, each "
                "with a value from -100 to 100; change it"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token alone is wanted, of logits as they are."""
        changed = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return not (self.temperature or changed or self.top_logprobs)


@dataclass
class Completion:
    """What a request got: a piece of it in one step, or all of it."""

    tokens: list[int] = field(default_factory=list)  # with the stop token, if it ended by one
    logprobs: list[float] = field(default_factory=list)  # untempered; 0 for forced tokens
    sampled: list[bool] = field(default_factory=list)  # False: forced by the tool
    finish: str = ""  # stop, length (max_new_tokens), context (cache full), cancelled or error
    id: int = 0  # of the request
    top: list[Top] = field(default_factory=list)  # of each token, if asked for
    prompt: list[tuple[float, Top]] | None = (
        None  # of each id of the prompt but the first, likewise
    )
    reason: str = ""  # of an error

    def add(self, piece: "Completion") -> None:
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.sampled += piece.sampled
        self.top += piece.top
        self.prompt = piece.prompt if self.prompt is None else self.prompt
        self.finish, self.reason = piece.finish, piece.reason


class Tool(NamedTuple):
    """`run` gets the ids between start_id and end_id; what it returns is forced next."""

    start_id: int
    end_id: int
    run: Callable[[list[int]], list[int]]
