"""Byte-level BPE: rustbpe learns the merges, tiktoken applies them.

    text -> split pattern -> pieces -> bytes -> merges, lowest rank first -> ids

- Ids 0..n-1 are the mergeable tokens, the single bytes among them; the special tokens come last.
- Text never yields a special id, even when it spells one out: only `special_id` hands them out.
- Lone surrogates, which no UTF-8 text holds, become U+FFFD. All else comes back from `decode`.
- On disk there is one JSON file, whose SHA-256 is `Tokenizer.sha256()`. Nothing is ever unpickled.

The split pattern is GPT-4's (cl100k_base), except that digits go in pairs and not in threes, which
spends fewer of a small vocabulary's tokens on numbers.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from nanochat_jax.common import UserError, atomic_write, log, read_json

SPECIAL_TOKENS = (
    "<|bos|>",  # starts every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator
    "<|python_end|>",
    "<|output_start|>",  # the calculator answers
    "<|output_end|>",
)

SPLIT_PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",  # a word, with one leading space or sign
        r"\p{N}{1,2}",  # digits in pairs
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",  # signs, with a leading space and the line end
        r"\s*[\r\n]",  # line ends and the blanks before them
        r"\s+(?!\S)",  # blanks, the last one left to the word that follows
        r"\s+",
    )
)

FILE_NAME = "tokenizer.json"
LAYOUT = '{"pattern": regex, "ranks": [[hex, id], ...], "special": {name: id}}'
NUM_BYTE_TOKENS = 256
MIN_VOCAB_SIZE = NUM_BYTE_TOKENS + len(SPECIAL_TOKENS)
# The regex engine under tiktoken and rustbpe gives up (it aborts, no error) on a run of blanks near
# 10^6 characters, so a longer text goes through it in stretches of at most this many.
MAX_STRETCH_CHARS = 1 << 16


class Tokenizer:
    """An immutable encoder; safe to share between threads and to send to worker processes.

    Raises ValueError unless the ranks are 0..n-1 and hold all single bytes, and for a bad pattern.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str = SPLIT_PATTERN):
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"token ids are not 0..{len(ranks) - 1}, each once")
        if missing := sum(bytes([byte]) not in ranks for byte in range(NUM_BYTE_TOKENS)):
            raise ValueError(f"{missing} of the {NUM_BYTE_TOKENS} single-byte tokens are missing")
        self.ranks, self.pattern = ranks, pattern
        self._tokens = sorted(ranks, key=ranks.__getitem__)
        self.special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = len(ranks) + len(self.special)
        self._encoding = tiktoken.Encoding(
            "nanochat-jax", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special
        )

    @property
    def bos_id(self) -> int:
        return self.special["<|bos|>"]

    def special_id(self, name: str) -> int:
        return self.special[name]

    def encode(self, text: str, bos: bool = False) -> list[int]:
        ids = [self.bos_id] if bos else []
        for stretch in stretches(text):
            ids += self._encoding.encode_ordinary(stretch)
        return ids

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, num_threads: int = 4
    ) -> list[list[int]]:
        """`encode` of each text, in order, in threads: tiktoken releases the GIL."""
        # One contiguous share per thread: handing over every text would cost more than a short one.
        share = max(1, -(-len(texts) // num_threads))
        shares = [texts[start : start + share] for start in range(0, len(texts), share)]
        with ThreadPoolExecutor(num_threads) as pool:
            parts = pool.map(lambda part: [self.encode(text, bos) for text in part], shares)
            return [ids for part in parts for ids in part]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens by name, bytes that are not UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> np.ndarray:
        """Bytes that each id stands for, int32 [vocab_size]; 0 for specials. For bits per byte."""
        return np.array([*map(len, self._tokens), *[0] * len(self.special)], np.int32)

    def to_json(self) -> str:
        """The canonical form: the same tokenizer gives the same text, byte for byte."""
        ranks = [[token.hex(), rank] for rank, token in enumerate(self._tokens)]
        content = {"pattern": self.pattern, "ranks": ranks, "special": self.special}
        return json.dumps(content, separators=(",", ":")) + "\n"

    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, directory: Path) -> None:
        atomic_write(Path(directory) / FILE_NAME, self.to_json())

    @staticmethod
    def load(directory: Path) -> "Tokenizer":
        """Read `directory`/tokenizer.json. Raises UserError when it is missing or inconsistent."""
        path, to_do = Path(directory) / FILE_NAME, "train it with scripts/tok_train.py"
        content = read_json(path, to_do)
        try:
            ranks = {bytes.fromhex(token): rank for token, rank in content["ranks"]}
            tokenizer = Tokenizer(ranks, content["pattern"])
            if content["special"] != tokenizer.special:
                raise ValueError(f"special tokens that are not {tokenizer.special}")
        except (KeyError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(f"{path}: got {reason}, expected {LAYOUT}; {to_do}") from None
        return tokenizer


def stretches(text: str, max_chars: int = MAX_STRETCH_CHARS) -> list[str]:
    """Cut a long text where the split pattern cuts anyway: before a blank that follows a non-blank.

    Only where there is none for `max_chars` (a megabyte of blanks, say) is the cut arbitrary.
    """
    if len(text) <= max_chars:
        return [text]
    at_most = f".{{1,{max_chars}}}"
    # Well-formed before it is cut, which could part a surrogate pair.
    return re.findall(rf"(?s){at_most}(?:\Z|(?<=\S)(?= ))|{at_most}", well_formed(text))


def well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # surrogates: the same treatment tiktoken gives them
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def capped(texts: Iterable[str], max_chars: int, doc_cap: int) -> Iterator[str]:
    """Each text cut to `doc_cap` characters, up to and with the one that passes `max_chars`."""
    num_chars = 0
    for text in texts:
        text = text[:doc_cap]
        num_chars += len(text)
        yield text
        if num_chars > max_chars:
            return


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary of `vocab_size` tokens, specials included; smaller if the text runs out.

    The most frequent pair is merged first, of equals the one with the lower ids.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"got vocab_size {vocab_size}, expected at least {MIN_VOCAB_SIZE}: "
            f"{NUM_BYTE_TOKENS} bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    pieces = (piece for text in texts for piece in stretches(well_formed(text)))
    trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train_from_iterator(pieces, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    tokenizer = Tokenizer({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})
    if tokenizer.vocab_size == MIN_VOCAB_SIZE < vocab_size:
        raise UserError("got no text with pairs to merge; download or pack data first")
    if tokenizer.vocab_size < vocab_size:
        log(
            "tokenizer: the text has no more pairs to merge; "
            f"the vocabulary is {tokenizer.vocab_size:,} instead of {vocab_size:,}"
        )
    return tokenizer
