"""A conversation as token ids, and which of them the model learns to say.

    <|bos|> (<|user_start|> text <|user_end|> <|assistant_start|> content <|assistant_end|>)*

Assistant content is a string or a list of parts {"type", "text"}:
    text            trained
    python          <|python_start|> text <|python_end|>, trained: the model calls the tool
    python_output   <|output_start|> text <|output_end|>, not trained: the tool answers

Roles alternate, the user first; a leading system message becomes the start of the first user
message; mask 1 stands on exactly what the assistant says, its <|assistant_end|> included.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanochat_jax.common import UserError
from nanochat_jax.tokenizer.bpe import Tokenizer

# part type -> (opening token, closing token, trained)
PARTS = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}
ROLES = ("user", "assistant")
IGNORE = -1  # a target that adds nothing to the loss


def render_conversation(
    tokenizer: Tokenizer, conversation: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """Ids and loss mask (1 = trained). Raises UserError if malformed."""
    return _render(tokenizer, check(conversation))


def render_for_completion(tokenizer: Tokenizer, conversation: Mapping[str, Any]) -> list[int]:
    """The prompt for the last answer: all before it, and <|assistant_start|>."""
    turns = check(conversation)
    ids, _ = _render(tokenizer, turns[:-1] if turns[-1][0] == "assistant" else turns)
    return [*ids, tokenizer.special_id("<|assistant_start|>")]


def cut_at_turn(
    ids: list[int], mask: list[int], max_tokens: int, assistant_end: int
) -> tuple[list[int], list[int]]:
    """A rendered conversation without the turns that end beyond `max_tokens`.

    Of the first answer, if it is too long itself, the beginning; nothing if no token is trained.
    """
    if len(ids) <= max_tokens:
        return ids, mask
    ends = [i + 1 for i in range(max_tokens) if ids[i] == assistant_end]
    stop = ends[-1] if ends else max_tokens
    return (ids[:stop], mask[:stop]) if any(mask[:stop]) else ([], [])


def pad_batch(
    rows: Sequence[tuple[list[int], list[int]]], pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rendered conversations as (inputs, targets), int32 [R, longest - 1], one row each.

    Target t is the id after input t where that is trained, else IGNORE; `pad_id` fills the right.
    """
    width = max(len(ids) for ids, _ in rows) - 1
    inputs = np.full((len(rows), width), pad_id, np.int32)
    targets = np.full((len(rows), width), IGNORE, np.int32)
    for row, (ids, mask) in enumerate(rows):
        last = len(ids) - 1
        inputs[row, :last] = ids[:-1]
        targets[row, :last] = np.where(np.asarray(mask[1:]) == 1, ids[1:], IGNORE)
    return inputs, targets


def _render(tokenizer: Tokenizer, turns: list[tuple[str, Any]]) -> tuple[list[int], list[int]]:
    ids, mask = [tokenizer.bos_id], [0]

    def add(trained: int, opening: str | None, text: str, closing: str | None) -> None:
        new = [tokenizer.special_id(opening)] if opening else []
        new += tokenizer.encode(text)
        new += [tokenizer.special_id(closing)] if closing else []
        ids.extend(new)
        mask.extend([trained] * len(new))

    for role, content in turns:
        if role == "user":
            add(0, "<|user_start|>", content, "<|user_end|>")
            continue
        add(0, "<|assistant_start|>", "", None)
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            opening, closing, trained = PARTS[part["type"]]
            add(trained, opening, part["text"], closing)
        add(1, None, "", "<|assistant_end|>")
    return ids, mask


def check(conversation: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Checked (role, content) pairs, the system message already joined to the first user's."""
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f'got {_short(conversation)}, expected {{"messages": [{{"role", "content"}}, ...]}} '
            "with at least one message"
        )
    has_system = isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
    if has_system and len(messages) == 1:
        raise UserError("the system message stands alone, expected a user message after it")
    roles = itertools.chain(["system"] * has_system, itertools.cycle(ROLES))
    turns = []
    for number, (message, role) in enumerate(zip(messages, roles, strict=False)):
        said = message if isinstance(message, Mapping) else {}
        if said.get("role") != role or "content" not in said:
            raise UserError(
                f'message {number} is {_short(message)}, expected {{"role": {role!r}, "content": '
                "...}: user and assistant alternate, the user first"
            )
        content = said["content"]
        of_parts = role == "assistant" and isinstance(content, list)
        wrong = [part for part in content if not _is_part(part)] if of_parts else []
        if wrong or not (of_parts or isinstance(content, str)):
            parts = f'text or a list of {{"type": one of {", ".join(PARTS)}, "text": text}}'
            expected = parts if role == "assistant" else "text"
            got = f"message {number} of the {role} has {_short(wrong[0] if wrong else content)}"
            raise UserError(f"{got}, expected {expected}")
        turns.append((role, content))
    if has_system:
        turns[:2] = [("user", f"{turns[0][1]}\n\n{turns[1][1]}")]
    return turns


def _is_part(part: Any) -> bool:
    types = tuple(PARTS)  # a type that is not hashable is none of them
    return isinstance(part, Mapping) and part.get("type") in types and type(part.get("text")) is str


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
