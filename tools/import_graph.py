"""Imports between the project's own modules: those that resolve to nothing, and circles."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator

from tools.source_files import TEST_FOLDERS, TOOL_FOLDERS, SourceFile

_OURS = {"codecllm", *TEST_FOLDERS, *TOOL_FOLDERS}


class ImportGraph:
    """Modules and the modules that each of them imports, at any level and for types too.

    A package's `__init__`, which Python runs before each module below it, counts only where an
    import names the package itself. Compiled modules are named by `stubs`; they import nothing.
    """

    def __init__(self, files: Iterable[SourceFile], stubs: Collection[str] = ()) -> None:
        self._stubs = set(stubs)
        self._files = {file.module: file for file in files}
        self._bound = {name: set(_bound_names(file.tree)) for name, file in self._files.items()}
        self.unresolved: list[str] = []
        self.edges = {name: self._imports(file) for name, file in self._files.items()}

    def circles(self) -> list[list[str]]:
        """Returns each group of modules that import each other, directly or through others."""
        return [sorted(group) for group in _strong_components(self.edges) if len(group) > 1]

    def _imports(self, file: SourceFile) -> set[str]:
        modules: set[str] = set()
        for node in ast.walk(file.tree):
            for module, name, line in _imported(node):
                if module.split(".")[0] not in _OURS or self._is_compiled(module, name):
                    continue
                target = self._resolve(module, name)
                if target is None:
                    full_name = module if name is None else f"{module}.{name}"
                    self.unresolved.append(f"{file.path}:{line}: {full_name}")
                else:
                    modules.add(target)
        return modules - {file.module}

    def _is_compiled(self, module: str, name: str | None) -> bool:
        return module in self._stubs or f"{module}.{name}" in self._stubs

    def _resolve(self, module: str, name: str | None) -> str | None:
        """Returns the module that an import reaches, None if there is no such module or name."""
        if name is not None and f"{module}.{name}" in self._files:
            return f"{module}.{name}"
        if module not in self._files:
            return None
        names = self._bound[module]
        if name is None or name == "*" or name in names or "__getattr__" in names:
            return module
        return None


def _imported(node: ast.AST) -> Iterator[tuple[str, str | None, int]]:
    """Yields module, name (None for a plain `import`) and line of each import of a statement."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, None, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield from ((node.module, alias.name, node.lineno) for alias in node.names)


def _bound_names(tree: ast.Module) -> Iterator[str]:
    """Yields all names bound in a module outside its functions and classes."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        else:
            pending.extend(ast.iter_child_nodes(node))


def _strong_components(edges: dict[str, set[str]]) -> list[list[str]]:
    """Returns the strongly connected components of a graph (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in sorted(edges[module]):
            if target not in order:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], order[target])
        if lowest[module] == order[module]:
            first = stack.index(module)
            components.append(stack[first:])
            del stack[first:]

    for module in edges:
        if module not in order:
            visit(module)
    return components
