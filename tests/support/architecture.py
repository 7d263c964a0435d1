"""Reads a package's source: which file imports which, how large things are, and what the layout forbids.

Every check returns one sentence for each violation; an empty list means that the package keeps the law.
"""

import ast
import collections
import functools
import graphlib
from collections.abc import Iterator, Sequence
from pathlib import Path

Floors = Sequence[Sequence[str]]  # lowest first; each names folders and modules of the package's root


class Package:
    """The files of one package: `modules` is dotted name -> path, `trees` dotted name -> syntax tree."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.modules = {self._module(path): path for path in sorted(folder.rglob("*.py"))}
        self.trees = {module: ast.parse(path.read_text()) for module, path in self.modules.items()}

    def _module(self, path: Path) -> str:
        return ".".join(path.relative_to(self.folder.parent).with_suffix("").parts).removesuffix(".__init__")

    def file(self, module: str) -> str:
        return str(self.modules[module].relative_to(self.folder.parent))

    def room(self, module: str) -> str:
        """The folder, or the module of the root, that the module belongs to."""
        return self.modules[module].relative_to(self.folder).parts[0].removesuffix(".py")

    def imported(self, module: str) -> Iterator[tuple[str, str]]:
        """(imported module, imported name or "") of every import: at the top, in functions, and for types only."""
        here = module.split(".") if self.modules[module].name == "__init__.py" else module.split(".")[:-1]
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names if alias.name in self.modules)
            elif isinstance(node, ast.ImportFrom):
                base = here[: len(here) + 1 - node.level] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    if f"{source}.{alias.name}" in self.modules:
                        yield f"{source}.{alias.name}", ""
                    elif source in self.modules:
                        yield source, alias.name

    @functools.cached_property
    def arrows(self) -> dict[str, set[str]]:
        return {module: {to for to, _ in self.imported(module)} - {module} for module in self.modules}


def circles(package: Package) -> list[str]:
    """Circles between files, and between rooms: one of each, for to cut it shows the next."""
    found = [_circle({package.file(a): {package.file(b) for b in to} for a, to in package.arrows.items()})]
    rooms = collections.defaultdict(set)
    for module, targets in package.arrows.items():
        rooms[package.room(module)] |= {package.room(to) for to in targets} - {package.room(module)}
    found.append(_circle(rooms))
    return [circle for circle in found if circle]


def _circle(graph: dict[str, set[str]]) -> str:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return "a circle: " + " -> ".join(reversed(error.args[1]))
    return ""


def arrows_up(package: Package, floors: Floors) -> list[str]:
    """Imports of a higher floor, imports by the ground of anything else, and rooms without a floor."""
    level = {room: i for i, rooms in enumerate(floors) for room in rooms}
    homeless = {package.room(module) for module in package.modules} - set(level)
    found = [f"{room} has no floor" for room in sorted(homeless)]
    for module, targets in package.arrows.items():
        for to in sorted(targets):
            start, end = package.room(module), package.room(to)
            if start not in homeless and end not in homeless and level[end] > level[start]:
                found.append(f"{package.file(module)} -> {package.file(to)} runs up, from {start} to {end}")
    return found


def reexports(package: Package, allowed: Sequence[str]) -> list[str]:
    """Names imported from a module that only imports them itself; `allowed`: modules whose purpose that is."""
    bound = {
        module: {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for module, tree in package.trees.items()
    }
    return [
        f"{package.file(module)} takes {name} from {package.file(source)}, which imports it"
        for module in package.modules
        for source, name in sorted(set(package.imported(module)))
        if name in bound[source] and source not in allowed
    ]


def sizes(package: Package, *, root: int, folder: int, lines: int, function: int) -> list[str]:
    """Too many modules in the root or a folder, too many lines of a file or a function."""
    found = []
    for place, modules in _folders(package).items():
        limit = root if place == package.folder else folder
        if len(modules) > limit:
            found.append(f"{place.relative_to(package.folder.parent)} has {len(modules)} modules, {limit} at most")
    for module, length in file_lines(package).items():
        if length > lines:
            found.append(f"{package.file(module)} has {length} lines, {lines} at most")
        for node in ast.walk(package.trees[module]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno + 1 - node.lineno
                if length > function:
                    found.append(f"{package.file(module)}: {node.name} has {length} lines, {function} at most")
    return found


def file_lines(package: Package) -> dict[str, int]:
    return {module: path.read_text().count("\n") for module, path in package.modules.items()}


def shared_prefixes(package: Package, number: int) -> list[str]:
    """`number` or more modules of one folder that begin with the same word and an underscore: a folder in disguise."""
    found = []
    for place, modules in _folders(package).items():
        names = [name for name in modules if not name.startswith("_")]
        for prefix, count in collections.Counter(name.split("_")[0] for name in names).items():
            if count >= number:
                found.append(f"{place.relative_to(package.folder.parent)} has {count} modules named {prefix}_*")
    return found


def _folders(package: Package) -> dict[Path, list[str]]:
    folders = collections.defaultdict(list)
    for path in package.modules.values():
        folders[path.parent].append(path.stem)
    return folders


def doors(package: Package, commands: Sequence[str]) -> list[str]:
    """Commands without run.py, or without a __main__.py of three statements at most."""
    found = []
    for command in commands:
        if f"{package.name}.{command}.run" not in package.modules:
            found.append(f"{package.name}/{command}/run.py is missing")
        door = package.trees.get(f"{package.name}.{command}.__main__")
        if door is None or len(door.body) > 3:
            found.append(f"{package.name}/{command}/__main__.py is missing, or longer than three statements")
    return found


def count_any(package: Package) -> int:
    """How often `Any` stands in annotations and aliases."""
    nodes = (node for tree in package.trees.values() for node in ast.walk(tree))
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes)


def uses(package: Package, called: str, *, except_in: Sequence[str] = (), but: Sequence[str] = ()) -> list[str]:
    """Calls of a function by its last name, outside the rooms `except_in` and but for the calls `but`, as source."""
    found = []
    for module, tree in package.trees.items():
        if package.room(module) not in except_in:
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
            for call in calls:
                if ast.unparse(call.func).split(".")[-1] == called and ast.unparse(call) not in but:
                    found.append(f"{package.file(module)}:{call.lineno} calls {called}")
    return found
