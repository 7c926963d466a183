"""What may be asked: the bodies of OpenAI's API, and from a body to requests for the engine.

Unknown fields are passed over; those that would change the answer and that we do not have are
refused. Whatever is wrong with a body is the client's mistake, told as OpenAI tells it:

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from nanochat_jax.common import UserError
from nanochat_jax.inference.request import Request
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import PARTS, render_conversation, render_for_completion

MAX_CHARS, MAX_MESSAGES, MAX_CHOICES, MAX_STOP_CHARS = 1_000_000, 2_000, 128, 200
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI's; a chat's answer may fill the context
TEMPERATURE, TOP_K = 0.6, 50  # where a body says nothing of sampling, as in chat_cli
# Fields that would change the answer, and the values with which they do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),
    "min_p": (0,),
    "repetition_penalty": (1,),
}


class ApiError(Exception):
    """An answer that is an error; `code` is OpenAI's word where it has one."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = {"error": error}


class Lenient(BaseModel):
    """Typed strictly: "1" is no number. Fields that are not known are kept, and not looked at."""

    model_config = ConfigDict(extra="allow", strict=True)


class Part(Lenient):
    type: str
    text: str


class Message(Lenient):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, content: Any) -> Any:
        if not isinstance(content, str | list):
            raise ValueError(f"got {_kind(content)}, expected text or a list of text parts")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                got = part.get("type") if isinstance(part, dict) else _kind(part)
                raise ValueError(f"got a part {got!r:.80}, expected text parts only")
        return content


class StreamOptions(Lenient):
    include_usage: bool | None = None


class Sampling(Lenient):
    """What both kinds of completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None  # an extension; 0, -1: all
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] | None
    ) = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    tool: str | None = None  # an extension: the name of the tool the model may call, or "none"

    @field_validator("stop", mode="before")
    @classmethod
    def _is_stop(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if stops is None or (
            isinstance(stops, list)
            and len(stops) <= 4
            and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops)
        ):
            return stop
        raise ValueError(f"expected up to 4 strings of 1 to {MAX_STOP_CHARS} characters")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatBody(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionBody(Sampling):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None  # an extension; false: no <|bos|> is put in front

    @field_validator("prompt", mode="before")
    @classmethod
    def _is_prompt(cls, prompt: Any) -> Any:
        ids = isinstance(prompt, list) and bool(prompt) and _are_ids(prompt)
        several = isinstance(prompt, list) and 0 < len(prompt) <= MAX_CHOICES
        if (isinstance(prompt, str) and prompt) or ids:
            return prompt
        if several and (
            all(isinstance(one, str) and one for one in prompt)
            or all(isinstance(one, list) and one and _are_ids(one) for one in prompt)
        ):
            return prompt
        raise ValueError(
            f"expected a text that is not empty, token ids, or a list of 1 to {MAX_CHOICES} of them"
        )

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, as they were sent."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # pyright: ignore[reportReturnType]


class TokenizeBody(Lenient):
    prompt: str
    add_special_tokens: bool | None = None


class DetokenizeBody(Lenient):
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_CHARS)]


class RenderBody(Lenient):
    text: str


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**31 for value in values)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def check_fields(body: Sampling, model: str) -> None:
    """Refuse what no validator of a single field sees."""
    if body.model not in (None, "", model):
        raise ApiError(
            404,
            f"the model {body.model!r:.200} does not exist; this server has {model!r}",
            param="model",
            code="model_not_found",
        )
    extra = body.model_extra or {}
    for name, neutral in REFUSED.items():
        if extra.get(name) is not None and extra[name] not in neutral:
            raise _unsupported(name, f"{name} is not supported; leave it out")
    if body.stream_options and not body.stream:
        raise _bad("stream_options", "stream_options is only allowed with stream: true")
    if isinstance(body, ChatBody):
        if body.top_logprobs is not None and not body.logprobs:
            raise _bad("top_logprobs", "top_logprobs is only allowed with logprobs: true")
        if body.max_tokens == 0 and body.max_completion_tokens is None:
            raise _bad("max_tokens", "max_tokens got 0, expected at least 1")
    elif body.max_tokens == 0 and not (isinstance(body, CompletionBody) and body.echo):
        raise _bad("max_tokens", "max_tokens got 0, expected at least 1, or echo: true")


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids to be continued; a last message of the assistant is open, the answer goes on in it.

    Messages of one role in a row become one.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content = message.content
        if not isinstance(content, str):
            types = {part.type for part in content}
            if wrong := types - set(PARTS if role == "assistant" else ("text",)):
                raise _bad("messages", f"a message of {role!r} has a part {min(wrong)!r:.80}")
            parts = [{"type": part.type, "text": part.text} for part in content]
            content = "\n".join(part.text for part in content) if types <= {"text"} else parts
        if turns and turns[-1]["role"] == role:
            before = turns.pop()["content"]
            if isinstance(before, str) and isinstance(content, str):
                content = f"{before}\n\n{content}"
            else:
                content = [*_parts(before), *_parts(content)]
        turns.append({"role": role, "content": content})
    try:
        if turns[-1]["role"] == "assistant":
            ids, _ = render_conversation(tokenizer, {"messages": turns})
            return ids[:-1]  # without <|assistant_end|>
        return render_for_completion(tokenizer, {"messages": turns})
    except UserError as error:
        raise _bad("messages", str(error)) from None


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_prompt(tokenizer: Tokenizer, prompt: str | list[int], bos: bool) -> tuple[list[int], int]:
    """Ids to be continued, and how many of them the client did not send: <|bos|>, which stood
    before every text that the model has learned from."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    added = [tokenizer.bos_id] if bos and ids[:1] != [tokenizer.bos_id] else []
    return added + ids, len(added)


def check_chars(texts: Sequence[str]) -> None:
    if (total := sum(map(len, texts))) > MAX_CHARS:
        raise _bad(None, f"got {total:,} characters, expected at most {MAX_CHARS:,}; shorten them")


def to_requests(
    body: Sampling, prompts: Sequence[list[int]], tools: Sequence[str], max_len: int, vocab: int
) -> list[Request]:
    """body.n requests for each prompt, in order. tools: allowed ones, first the one meant when the
    body names none."""
    settings = _settings(body, tools, vocab)
    if isinstance(body, ChatBody):
        most = body.max_completion_tokens or body.max_tokens or max_len
    else:
        most = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if not settings["prompt_logprobs"]:
            most = max(most, 1)  # echo alone: the engine writes one, which is not shown
    for ids in prompts:
        if len(ids) >= max_len:
            raise ApiError(
                400,
                f"This model's maximum context length is {max_len} tokens, of which at least one "
                f"is for the answer. However, your prompt has {len(ids)} tokens. Please shorten it",
                param="messages" if isinstance(body, ChatBody) else "prompt",
                code="context_length_exceeded",
            )
        if max(ids) >= vocab:
            raise _bad("prompt", f"got token id {max(ids)}, expected 0 to {vocab - 1}")
    seed = secrets.randbits(63) if body.seed is None else body.seed
    choices = [(ids, choice) for ids in prompts for choice in range(body.n or 1)]
    try:
        # What does not fit into the context ends with "context".
        return [
            Request(ids, min(most, max_len), seed=(seed + choice) % 2**64, **settings)
            for ids, choice in choices
        ]
    except UserError as error:
        raise _bad(None, str(error)) from None


def _settings(body: Sampling, tools: Sequence[str], vocab: int) -> dict[str, Any]:
    """What the engine is to do beyond writing, by Request's names."""
    temperature, top_k = body.temperature, body.top_k
    if temperature is None:
        temperature, top_k = TEMPERATURE, TOP_K if top_k is None else top_k
    settings = {
        "temperature": temperature,
        "top_k": max(0, top_k or 0),
        "top_p": body.top_p or 1.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": _bias(body.logit_bias or {}, vocab),
    }
    if isinstance(body, ChatBody):
        tool = tools[0] if body.tool is None else body.tool
        if tool not in tools:
            raise _bad("tool", f"got {tool!r:.80}, expected one of {', '.join(tools)}")
        return settings | {"tool": tool, "top_logprobs": body.top_logprobs or 0}
    assert isinstance(body, CompletionBody)
    scored = bool(body.echo) and body.logprobs is not None
    more = {"top_logprobs": body.logprobs or 0, "prompt_logprobs": scored}
    return settings | {"tool": "none"} | more


def _bias(bias: Mapping[str, float], vocab: int) -> dict[int, float]:
    for id in bias:
        if not (id.isascii() and id.isdecimal() and len(id) < 10 and int(id) < vocab):
            raise _bad("logit_bias", f"got token id {id!r:.80}, expected 0 to {vocab - 1}")
    return {int(id): value for id, value in bias.items()}


def _bad(param: str | None, message: str) -> ApiError:
    return ApiError(400, message, param=param)


def _unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="unsupported_parameter")


def first_mistake(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Of what pydantic found wrong with a body."""
    error = errors[0]
    place = () if error["type"] == "json_invalid" else error["loc"][1:]  # without "body"
    param = ".".join(str(step) for step in place) or None
    message = error["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param)
