"""Check the structure that docs/extending.md and README.md promise, and print the figures. Run by `make lint`.

Arrows run down only, no circles, no test imports another test, imports stand at the top of the file (at most 15
exceptions, each for an optional dependency and with its reason), and the product does not grow.
"""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the lowest layer up: a module imports from its own layer and from those before it.
LAYERS = [
    ["modeling_gpt2modern"],
    [f"gpt2modern.{name}" for name in ("errors", "settings", "files", "cores", "hub", "pages")],
    ["gpt2modern.cli"],
    ["gpt2modern.loading"],
    ["gpt2modern.conversion"],
    ["gpt2modern.data"],
    ["gpt2modern.evaluation"],
    ["gpt2modern.training"],
    ["prepare_data", "train_accelerate"],
    ["eval", "benchmarks", "examples", "docs"],
    ["tests"],
]
OURS = re.compile(
    r"(gpt2modern|modeling_gpt2modern|prepare_data|train_accelerate|eval|benchmarks|examples|tests)(\.|$)"
)
MOST_LINES, MOST_INNER_IMPORTS = 16_250, 15
# The model's files travel alone. Where the library is installed too, they call it to import stock models.
OPTIONAL = {"modeling_gpt2modern.configuration_gpt2modern": {"gpt2modern.conversion"}}
EXCEPTION = re.compile(r"# noqa: PLC0415 +\S+")


def tracked(pattern: str) -> list[Path]:
    """List the files of the repository that match a git pattern."""
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, check=True, capture_output=True, text=True)
    return [ROOT / name for name in listed.stdout.split() if (ROOT / name).exists()]


def module_of(path: Path) -> str:
    """Return the dotted name of a file of the repository."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int | None:
    """Return the index in LAYERS of a module, None for the package gpt2modern itself, whose names are lazy."""
    for index, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return index
    return None


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Return the modules of ours that a file imports, wherever the import stands."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = f"{package}.{node.module}" if node.level else node.module
            for alias in node.names:  # `from package import module` is an import of the module
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base)
    return {name for name in found if OURS.match(name)}


def inner_imports(path: Path) -> list[str]:
    """Return the lines of a file on which an import stands inside a function."""
    text = path.read_text(encoding="utf-8")
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    nodes = {n.lineno for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)}
    return [text.splitlines()[number - 1] for number in sorted(nodes)]


def main() -> None:
    files = {module_of(path): path for path in tracked("*.py")}
    graph = {module: imports_of(path, set(files)) - OPTIONAL.get(module, set()) for module, path in files.items()}
    problems = []
    for module, imported in sorted(graph.items()):
        for name in sorted(imported):
            if module == "gpt2modern" or layer_of(name) is None:
                continue
            if layer_of(name) > layer_of(module):
                problems.append(f"{module} imports {name}, which lies above it")
            if layer_of(module) == layer_of(name) == 8 and module != name:
                problems.append(f"the script {module} imports the script {name}")
            if module.startswith("tests.test_") and name.startswith("tests.test_"):
                problems.append(f"{module} imports {name}: what tests share belongs into tests/support/")
    try:
        TopologicalSorter({module: imported - {module} for module, imported in graph.items()}).prepare()
    except CycleError as error:
        problems.append(f"imports run in a circle: {' -> '.join(error.args[1])}")

    product = [path for path in tracked("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", "examples")]
    lines = sum(path.read_text(encoding="utf-8").count("\n") for path in product)
    inner = [f"{path.relative_to(ROOT)}: {line.strip()}" for path in product for line in inner_imports(path)]
    problems += [f"no reason given: {line}" for line in inner if not EXCEPTION.search(line)]
    if len(inner) > MOST_INNER_IMPORTS:
        problems.append(f"{len(inner)} imports stand inside functions, at most {MOST_INNER_IMPORTS} may")
    if lines > MOST_LINES:
        problems.append(f"the product has {lines:,} lines, at most {MOST_LINES:,} are allowed")
    print(f"structure: {len(product)} files, {lines:,} lines, {len(inner)} imports inside functions")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
