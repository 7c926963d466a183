"""What the model may call while it writes, as tools of the engine.

<|python_start|> 12/60 <|python_end|>  ->  <|output_start|> 0.2 <|output_end|>, forced

  calculator   an expression of the calculator; anything else gets no answer
  python       an expression or any program, in the sandbox; the answer is its value or output
"""

import ast
from collections.abc import Iterable

from nanochat_jax.common import UserError
from nanochat_jax.inference.request import Tool
from nanochat_jax.tokenizer.bpe import Tokenizer
from nanochat_jax.tokenizer.chat import PARTS
from nanochat_jax.tools.calculator import calculate
from nanochat_jax.tools.sandbox import run_program

MAX_OUTPUT_CHARS = 400  # of a program; it has to fit the model's context


def make_tools(names: Iterable[str], tokenizer: Tokenizer) -> dict[str, Tool]:
    """The tools of these names: calculator, python."""
    return {name: _make_tool(name, tokenizer) for name in names}


def output_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids around what a tool says: a model that samples them would speak for the tool."""
    return [tokenizer.special_id(token) for token in PARTS["python_output"][:2]]


def _make_tool(name: str, tokenizer: Tokenizer) -> Tool:
    tools = {"calculator": calculate, "python": run_python}
    if not (answer := tools.get(name)):
        raise UserError(f"got tool {name!r}, expected one of none, {', '.join(tools)}")
    start, end = (tokenizer.special_id(token) for token in PARTS["python"][:2])
    opening, closing = output_ids(tokenizer)

    def run(ids: list[int]) -> list[int]:
        value = answer(tokenizer.decode(ids))
        return [] if value is None else [opening, *tokenizer.encode(value), closing]

    return Tool(start, end, run)


def run_python(code: str) -> str | None:
    """The value of an expression or the output of a program; the last line of its error."""
    if (value := calculate(code)) is not None:
        return value
    try:
        ast.parse(code.strip(), mode="eval")
        code = f"print(({code.strip()}\n))"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass  # a program, or nothing that Python can read, which the sandbox will say
    outcome = run_program(code, require=("network", "files", "time"))
    said = outcome.stdout.strip()
    if outcome.status != "ok":
        said = (outcome.stderr.strip().splitlines() or [outcome.status])[-1]
    return said[:MAX_OUTPUT_CHARS]
