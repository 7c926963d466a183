"""HumanEval, Python functions completed from their docstring (arXiv 2107.03374)."""

import re

_CODE_BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


def extract_program(completion: str) -> str:
    """The first fenced code block of an answer, or all of it when no block is closed."""
    block = _CODE_BLOCK.search(completion)
    return (block.group(1) if block else completion).strip()


def extract_imports(prompt: str) -> str:
    """The import lines at the head of a prompt: up to the first line of code, comments skipped."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)
