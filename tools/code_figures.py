"""Figures of Python source that a file of its own can give: words, names, density, docstrings."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tools.source_files import SourceFile

DIALECT = re.compile(r"\b(what|who|whoever|whatever|somebody|nobody|whom)\b", re.IGNORECASE)
"""Words that stand for an object which has a name of its own."""

_IRREGULAR = """
along alone apart asked beside begun bought brought built chosen done drawn fed felt forgotten found
given gone grown heard held here kept known laid led left lent lost made meant met nothing own paid
proven said seen sent shown sought spent spoken stood stolen sworn taken taught there thought thrown
thus told understood whence whither won worn written
"""
PARTICIPLES = frozenset(_IRREGULAR.split())
"""Names that say a state and leave out the object: irregular participles and adverbs."""

_OTHER_WORDS = "bed breed embed exceed feed hundred need red seed shed speed"
_TERMS = "expected signed unsigned"  # the field of an error; kinds of integers
_NOT_PARTICIPLES = frozenset(f"{_OTHER_WORDS} {_TERMS}".split())
_REGULAR = re.compile(r"[a-z]{2,}ed")
_SKIPPED_TOKENS = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class CodeFigures:
    """Counts of one file or, added up, of many; the ratios follow from them."""

    files: int = 0
    lines: int = 0
    code_lines: int = 0
    comment_lines: int = 0
    nodes: int = 0
    docstring_words: int = 0
    dialect_words: int = 0
    local_names: int = 0
    participles: Counter[str] = field(default_factory=Counter)
    public_functions: int = 0
    documented_functions: int = 0
    longest_line: int = 0
    long_lines: int = 0

    def add(self, other: CodeFigures) -> None:
        """Adds the counts of `other`; of the longest lines the longer one stays."""
        for name, value in vars(other).items():
            if name == "longest_line":
                self.longest_line = max(self.longest_line, value)
            else:
                setattr(self, name, getattr(self, name) + value)

    @property
    def dialect(self) -> float:
        """Words of `DIALECT` in 1,000 words of docstrings."""
        return 1000 * self.dialect_words / max(self.docstring_words, 1)

    @property
    def participle_percent(self) -> float:
        """Local names that are bare participles, in percent."""
        return 100 * self.participles.total() / max(self.local_names, 1)

    @property
    def density(self) -> float:
        """Syntax nodes in a line of code."""
        return self.nodes / max(self.code_lines, 1)

    @property
    def comment_percent(self) -> float:
        """Lines with a comment, in percent of the lines of code."""
        return 100 * self.comment_lines / max(self.code_lines, 1)

    @property
    def documented_percent(self) -> float:
        """Public functions that have a docstring, in percent."""
        return 100 * self.documented_functions / max(self.public_functions, 1)


def measure(file: SourceFile, longest: int = 100) -> CodeFigures:
    """Counts all figures of one file; a line longer than `longest` characters is a long one."""
    docstrings = [text for _, text in _docstrings(file.tree)]
    widths = [len(line) for line in file.lines]
    code, comments = _code_and_comment_lines(file)
    names = [name for function in _functions(file.tree) for name in local_names(function)]
    public = list(_public_functions(file.tree.body))
    return CodeFigures(
        files=1,
        lines=len(widths),
        code_lines=len(code),
        comment_lines=len(comments),
        nodes=sum(1 for _ in ast.walk(file.tree)),
        docstring_words=sum(len(text.split()) for text in docstrings),
        dialect_words=sum(len(DIALECT.findall(text)) for text in docstrings),
        local_names=len(names),
        participles=Counter(name for name in names if is_bare_participle(name)),
        public_functions=len(public),
        documented_functions=sum(ast.get_docstring(function) is not None for function in public),
        longest_line=max(widths, default=0),
        long_lines=sum(width > longest for width in widths),
    )


def is_bare_participle(name: str) -> bool:
    """Tells whether a name is one participle or adverb, without the thing that it describes.

    Examples:
        >>> is_bare_participle("held"), is_bare_participle("held_bytes"), is_bare_participle("seed")
        (True, False, False)
    """
    name = name.strip("_")
    if name in PARTICIPLES:
        return True
    return _REGULAR.fullmatch(name) is not None and name not in _NOT_PARTICIPLES


def local_names(function: _Function) -> set[str]:
    """Returns the names that a function binds itself; parameters and inner functions left out."""
    return {
        node.id
        for statement in function.body
        for node in _walk_within(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _walk_within(node: ast.AST) -> Iterator[ast.AST]:
    """Walks a node without entering functions and classes defined in it."""
    if isinstance(node, _Function | ast.ClassDef | ast.Lambda):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _walk_within(child)


def _functions(tree: ast.Module) -> list[_Function]:
    return [node for node in ast.walk(tree) if isinstance(node, _Function)]


def _public_functions(body: list[ast.stmt]) -> Iterator[_Function]:
    """Yields functions of a module and methods of its public classes that have public names."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public_functions(node.body)
        elif isinstance(node, _Function) and not node.name.startswith("_"):
            yield node


def _docstrings(tree: ast.Module) -> Iterator[tuple[ast.Expr, str]]:
    """Yields each docstring as a statement and as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | _Function):
            text = ast.get_docstring(node)
            statement = node.body[0] if node.body else None
            if text is not None and isinstance(statement, ast.Expr):
                yield statement, text


def _code_and_comment_lines(file: SourceFile) -> tuple[set[int], set[int]]:
    """Returns numbers of lines with code (docstrings are none) and of lines with a comment."""
    documentation: set[int] = set()
    for statement, _ in _docstrings(file.tree):
        documentation.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(file.text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in _SKIPPED_TOKENS:
            code.update(range(token.start[0], token.end[0] + 1))
    return code - documentation, comments
