"""The calculator that the model may call while it writes: arithmetic, and counting in a string.

    12/60 -> 0.2        'strawberry'.count('r') -> 3        2**10, 5 % 3, open('x') -> refused

An expression is parsed, never run as code: its syntax tree may hold numbers, + - * / // and signs,
or string literals with count, lower and upper; anything else is refused. No timer guards it, so it
needs no signal and works in any thread: without powers a result has no more digits than its
expression, and the limits below are checked on the text, before the parser can go deep.

Alphabets and comma stripping are upstream's, so that both answer alike, but where upstream refuses
by a list of forbidden words: there 'direct' and 'open' cannot be counted in, here they can.
"""

import ast
import math
import operator
import re
import string

MAX_CHARS = 1000
MAX_OPERATORS = 200  # bounds the depth of the tree, each level of which takes one of these
_OPERATORS = frozenset("+-*/(.")

_ARITHMETIC_ALPHABET = frozenset(string.digits + "+-*/.() ")
_COUNTING_ALPHABET = frozenset(string.ascii_letters + string.digits + "'\"()._ ")
_STRING_LITERAL = re.compile(r"'[^']*'|\"[^\"]*\"")
_METHODS = {"count": (str.count, 1), "lower": (str.lower, 0), "upper": (str.upper, 0)}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def calculate(expression: str) -> str | None:
    """The value of an expression as Python prints it, or None when it is refused or has none."""
    if len(expression) > MAX_CHARS:
        return None
    expression = expression.replace(",", "").strip(" ")
    if sum(char in _OPERATORS for char in expression) > MAX_OPERATORS:
        return None
    if not _ARITHMETIC_ALPHABET.issuperset(expression) and not _is_counting(expression):
        return None
    try:
        return str(_number(ast.parse(expression, mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError):
        return None
    except (RecursionError, MemoryError):  # how the parser says "too deep" to a deep caller
        return None


def _is_counting(expression: str) -> bool:
    """Outside of its string literals it says count, lower, upper: no number, name or keyword."""
    words = re.findall(r"\w+", _STRING_LITERAL.sub(" ", expression))
    return _COUNTING_ALPHABET.issuperset(expression) and set(words) <= _METHODS.keys()


def _number(node: ast.expr) -> int | float:
    value = _value(node)
    # Text is no answer, and neither are infinity and nan.
    if isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("not a number")
    return value


def _text(node: ast.expr) -> str:
    if not isinstance(value := _value(node), str):
        raise ValueError("not text")
    return value


def _value(node: ast.expr) -> int | float | str:
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_number(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_number(left), _number(right))
        case ast.Call(func=ast.Attribute(value=text, attr=name), args=args, keywords=[]):
            method, num_arguments = _METHODS.get(name, (None, 0))
            if method and len(args) == num_arguments:
                return method(_text(text), *map(_text, args))
    raise ValueError("refused")
