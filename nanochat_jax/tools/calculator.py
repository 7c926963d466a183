"""The calculator that the model may call while it writes: arithmetic, and counting in a string.

    12/60 -> 0.2        'strawberry'.count('r') -> 3        2**10, 5 % 3, open('x') -> refused

An expression is parsed, never run as code: numbers with + - * / // and signs, or string literals
with count, lower and upper. It needs no timer, so it works in any thread: without powers a result
has no more digits than its expression, and the limits below are checked before it is parsed.
"""

import ast
import math
import operator
import re
import string
from typing import Any

MAX_CHARS = 1000
MAX_OPERATORS = 200  # and ( and . too: bounds the depth of the tree, whose levels take one each
_ARITHMETIC_ALPHABET = frozenset(string.digits + "+-*/.() ")
_COUNTING_ALPHABET = frozenset(string.ascii_letters + string.digits + "'\"()._ ")
_METHODS = {("count", 1): str.count, ("lower", 0): str.lower, ("upper", 0): str.upper}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_BINARY |= {ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}


def calculate(expression: str) -> str | None:
    """The value of an expression as Python prints it, or None when it is refused or has none."""
    if len(expression) > MAX_CHARS:
        return None
    expression = expression.replace(",", "").strip(" ")
    if sum(map(expression.count, "+-*/(.")) > MAX_OPERATORS:
        return None
    # Outside of its string literals, counting says nothing but names of methods.
    words = set(re.findall(r"\w+", re.sub(r"'[^']*'|\"[^\"]*\"", " ", expression)))
    counting = _COUNTING_ALPHABET.issuperset(expression) and words <= {name for name, _ in _METHODS}
    if not counting and not _ARITHMETIC_ALPHABET.issuperset(expression):
        return None
    try:
        return str(_value(ast.parse(expression, mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None  # the last two are how the parser says "too deep" to a deep caller


def _value(node: ast.expr, kind: type = float) -> Any:
    """A node's value: text where kind is str, else a finite number; ValueError where it is not."""
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            pass
        case ast.UnaryOp(op, operand) if type(op) in _UNARY:
            value = _UNARY[type(op)](_value(operand))
        case ast.BinOp(left, op, right) if type(op) in _BINARY:
            value = _BINARY[type(op)](_value(left), _value(right))
        case ast.Call(ast.Attribute(text, name), args, []) if (name, len(args)) in _METHODS:
            value = _METHODS[name, len(args)](*(_value(part, str) for part in (text, *args)))
        case _:
            raise ValueError("refused")
    if isinstance(value, str) != (kind is str) or value in (math.inf, -math.inf):  # so no nan
        raise ValueError("refused")
    return value
