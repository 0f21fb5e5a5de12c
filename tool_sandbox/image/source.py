"""Makes a program of a text that a model wrote. `python` would not accept each of them.

Source that Python parses is run as it is. Other source is repaired, in this order: a Markdown fence around it, the prompts
of a copied session, characters that only look like spaces, quotes or ASCII, an indentation that all lines have, and
IPython's magics. Lines are blanked, never removed, so that a traceback has the line numbers of the given text. Source that
can't be repaired stays a SyntaxError.

As in a notebook, `await` works outside of a function and the value of a last expression is shown. Only the standard library
is used, and nothing is executed here.
"""

from __future__ import annotations
import __future__

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType

LANGUAGES = {"", "py", "py3", "python", "python3", "ipython", "ipython3", "pycon", "tool_code"}
"""The languages of fences whose blocks are used. Blocks of other languages are left out."""

OPENS = re.compile(r"[ \t]*(?:`{3,}|~{3,})[ \t]*([\w+-]*)[ \t]*$")
CLOSES = re.compile(r"[ \t]*(?:`{3,}|~{3,})[ \t]*$")
# A string or a comment, which stay as they are, or elsewhere a character that looks like a space or is invisible.
STRING_OR_SPACE = re.compile(
    r"""(?:\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*)"""
    "|(?P<space>[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000])|(?P<nothing>[\u200b-\u200d\u2060\ufeff\u00ad])",
    re.DOTALL,
)
# A string in typographic quotes, or a character that replaces one of ASCII. Strings and comments stay as they are.
STRING_OR_MARK = re.compile(
    STRING_OR_SPACE.pattern.partition("|(?P<space>")[0]
    + "|[\u201c\u201d\u201e](?P<double>[^\u201c\u201d\u201e\\n]*)[\u201c\u201d]"
    "|[\u2018\u2019\u201a](?P<single>[^\u2018\u2019\u201a\\n]*)[\u2018\u2019]"
    "|(?P<wide>[\uff01-\uff5e])|(?P<minus>[\u2212\u2013])",
    re.DOTALL,
)
PROMPT = re.compile(r"[ \t]*(?:>>>|\.\.\.)(?: |$)")
TAGS = {"python", "python3", "py"}
"""A word that may be alone on the first line: the language of a fence that was removed."""

MAGIC = re.compile(r"[ \t]*(%%?|!)[ \t]*([\w.-]*)[ \t]*(.*)$")
WITHOUT_EFFECT = {"matplotlib", "config", "load_ext", "reload_ext", "autoreload", "pylab", "precision", "capture"}
TIMERS = {"time", "timeit", "prun"}
OPTIONS = re.compile(r"(?:-\w+(?:[ \t]+\d+)?[ \t]+)*")
INSTALLERS = re.compile(r"(?:pip3?|conda|mamba|uv|apt|apt-get|sudo|python3?[ \t]+-m[ \t]+pip)\b.*\binstall\b")
FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
FUTURES = 0
for _name in __future__.all_feature_names:
    FUTURES |= getattr(__future__, _name).compiler_flag


@dataclass(frozen=True, slots=True)
class Program:
    """Run `parts` one after another in one namespace. `text` is what a traceback shows, line by line."""

    parts: tuple[CodeType, ...]
    text: str


def prepare(text: str, filename: str, *, call_solution: bool = False) -> Program:
    """The program that `text` means. Raises what `compile` does: SyntaxError, ValueError, and of nesting that is too deep
    for Python's parser RecursionError or MemoryError.

    `call_solution`: source that defines nothing but functions, the last of them `solution()`, means a call of it."""
    text = text.removeprefix("\ufeff")
    head, line_end, rest = text.partition("\n")
    if head.strip() in TAGS and rest.strip():
        text = line_end + rest
    try:
        tree = _parse(text, filename)
    except SyntaxError as raised:
        error = raised
    else:
        return _program(tree, text, filename, call_solution=call_solution)
    # Outside of the handler: otherwise a later error would be shown together with the one that was repaired.
    text, tree = _mend(text, filename, error)
    return _program(tree, text, filename, call_solution=call_solution)


def _program(tree: ast.Module, text: str, filename: str, *, call_solution: bool) -> Program:
    try:
        return Program(_compile(tree, text, filename, call_solution=call_solution), text)
    except RecursionError:  # a tree may be nested less deeply than source
        return Program((compile(text, filename, "exec", flags=FLAGS, dont_inherit=True),), text)


def _parse(text: str, filename: str) -> ast.Module:
    tree = compile(text, filename, "exec", flags=FLAGS | ast.PyCF_ONLY_AST, dont_inherit=True)
    assert isinstance(tree, ast.Module)
    return tree


def _compile(tree: ast.Module, text: str, filename: str, *, call_solution: bool) -> tuple[CodeType, ...]:
    """Two parts if the last statement is an expression whose value is to be shown. The second part gives it to
    `sys.displayhook`, as Python's interactive mode does."""
    last = tree.body[-1] if tree.body else None
    if call_solution and _only_defines_solution(tree):
        assert last is not None
        call = ast.parse("solution()").body[0]
        last = ast.increment_lineno(call, last.lineno - 1)
        tree.body.append(last)
    if not isinstance(last, ast.Expr) or text.rstrip().endswith(";") or _is_write(last.value):
        return (compile(tree, filename, "exec", flags=FLAGS, dont_inherit=True),)
    rest = ast.Module(tree.body[:-1], tree.type_ignores)
    first = compile(rest, filename, "exec", flags=FLAGS, dont_inherit=True)
    flags = FLAGS | first.co_flags & FUTURES
    second = compile(ast.Interactive([last]), filename, "single", flags=flags, dont_inherit=True)
    return (first, second) if rest.body else (second,)


def _is_write(value: ast.expr) -> bool:
    """Whether it is `file.write(…)`, whose value, a count, isn't shown."""
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "write"


def _only_defines_solution(tree: ast.Module) -> bool:
    defines = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.FunctionDef) or last.name != "solution" or last.decorator_list:
        return False
    arguments = last.args
    num_needed = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    if num_needed or None in arguments.kw_defaults:
        return False
    return all(isinstance(node, defines) or _is_text(node) for node in tree.body)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


# --- what Python doesn't parse ------------------------------------------------------------------------------------------


def _mend(text: str, filename: str, error: SyntaxError) -> tuple[str, ast.Module]:
    """Applies each repair in turn, until Python parses the text. Raises the last SyntaxError."""
    repairs: tuple[Callable[[str], str], ...] = (
        _without_fences,
        _without_prompts,
        _with_plain_spaces,
        _with_plain_marks,
        _unindented,
    )
    for repair in repairs:
        if repair is _unindented and "unexpected indent" not in str(error):
            continue
        mended = repair(text)
        if mended == text:
            continue
        text = mended
        try:
            return text, _parse(text, filename)
        except SyntaxError as later:
            error = later
    return _without_magics(text, filename, error)


def _without_fences(text: str) -> str:
    """Only the fenced blocks of Python, if there are any; the other lines are blank. A last fence may be missing."""
    lines, inside, num_blocks = text.split("\n"), False, 0
    kept = [""] * len(lines)
    for number, line in enumerate(lines):
        line = line.rstrip("\r")
        if inside and CLOSES.match(line):
            inside = False
        elif not inside and (opening := OPENS.match(line)) is not None:
            # A single fence at the end closes a block without an opening fence.
            if num_blocks == 0 and not opening[1] and not any(other.strip() for other in lines[number + 1 :]):
                return "\n".join([*lines[:number], *kept[number:]])
            inside = opening[1].lower() in LANGUAGES
            num_blocks += inside
        elif inside:
            ends = line.rstrip().endswith("```")
            kept[number] = line.rstrip().removesuffix("```") if ends else line
            inside = not ends
    return "\n".join(kept) if num_blocks else text


def _with_plain_spaces(text: str) -> str:
    def mend(match: re.Match[str]) -> str:
        return " " if match["space"] else "" if match["nothing"] else match[0]

    return STRING_OR_SPACE.sub(mend, text)


def _with_plain_marks(text: str) -> str:
    def mend(match: re.Match[str]) -> str:
        if match["wide"]:
            return chr(ord(match["wide"]) - 0xFEE0)
        if match["minus"]:
            return "-"
        for name, quote in (("double", '"'), ("single", "'")):
            if (content := match[name]) is not None:
                return f"{quote}{content}{quote}" if quote not in content else repr(content)
        return match[0]

    return STRING_OR_MARK.sub(mend, text)


def _without_prompts(text: str) -> str:
    """The input of a session that was copied with its prompts and answers."""
    lines = text.split("\n")
    written = [line for line in lines if line.strip()]
    if not written or not PROMPT.match(written[0]):
        return text
    return "\n".join(line[prompt.end() :] if (prompt := PROMPT.match(line)) else "" for line in lines)


def _unindented(text: str) -> str:
    """Without the indentation that all lines have, or all but the first, which then lost it on the way here."""
    lines = text.split("\n")
    written = [line for line in lines if line.strip()]
    margin = _margin(written) or _margin(written[1:])
    return "\n".join(line.removeprefix(margin) for line in lines)


def _margin(lines: list[str]) -> str:
    """The longest white space that all `lines` begin with."""
    if not lines:
        return ""
    low, high = min(lines), max(lines)
    size = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[: min(size, len(low) - len(low.lstrip()))]


def _without_magics(text: str, filename: str, error: SyntaxError) -> tuple[str, ast.Module]:
    """Replaces lines of IPython's own syntax: those without effect here are blanked, timers run their statement once, and
    the others are refused with a sentence."""
    lines = text.split("\n")
    for _ in lines:
        number = (error.lineno or 0) - 1
        magic = MAGIC.match(lines[number]) if 0 <= number < len(lines) else None
        if magic is None:
            raise error
        lines[number] = _of_magic(magic, number + 1, filename)
        text = "\n".join(lines)
        try:
            return text, _parse(text, filename)
        except SyntaxError as later:
            error = later
    raise error


def _of_magic(magic: re.Match[str], number: int, filename: str) -> str:
    """What remains of the line."""
    sign, name, rest = magic[1], magic[2], magic[3]
    command = f"{name} {rest}".strip()
    indent = magic[0][: len(magic[0]) - len(magic[0].lstrip())]
    if sign != "!" and name in TIMERS:
        return indent + OPTIONS.sub("", rest, count=1)
    if INSTALLERS.match(command):
        asked = re.split(r"\binstall\b", command, maxsplit=1)[1].replace("'", "").replace('"', "").split()
        return f'{indent}__import__("pip").main({["install", *asked]});'
    if sign != "!" and name in WITHOUT_EFFECT:
        return indent and f"{indent}pass"
    kind = "shell commands" if sign == "!" else "magics"
    reason = f"this is Python and not IPython: {kind} are not run; for a command use subprocess.run"
    raise SyntaxError(reason, (filename, number, 1, magic[0], number, len(magic[0]) + 1))
