"""Find reports that are incomplete, or older than the code they measure."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from eval.evidence import REPORTS, git, reports

NEEDED = ("title", "question", "command", "commit", "versions", "hardware", "measures", "table", "results")


def code_of(path: str, text: str, names: str) -> str:
    """Return what can change a result: of a Python file the syntax tree without docstrings and comments, or only that
    of the functions, classes and constants `names`, which commas divide; of other files the text."""
    if not path.endswith(".py"):
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    chosen = [node for node in tree.body if not names or names_of(node) & {*names.split(",")}]
    return "\n".join(map(ast.dump, chosen))


def names_of(node: ast.stmt) -> set[str]:
    """Return what a statement at the top of a module defines: a function, a class, or constants."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    constants = {
        each.id for target in targets if target is not None for each in ast.walk(target) if isinstance(each, ast.Name)
    }
    return constants | {getattr(node, "name", None)}


def changed_since(root: Path, commit: str, measures: Sequence[str]) -> list[str]:
    """Return the files of `measures` (see `eval.evidence.Report`) whose code is not that of `commit`, or not in it."""
    names = {path: chosen for path, _, chosen in (entry.partition(":") for entry in measures)}
    changed = [path for path in names if git(root, "cat-file", "-e", f"{commit}:{path}") is None]
    listed = git(root, "diff", "--name-only", "--no-renames", commit, "--", *names) or ""
    for path in listed.splitlines():
        file = root / path
        texts = git(root, "show", f"{commit}:{path}") or "", file.read_text("utf-8") if file.exists() else ""
        before, now = (code_of(path, text, names.get(path, "")) for text in texts)
        if not before or before != now:
            changed.append(path)
    return list(dict.fromkeys(changed))


def problems(root: Path) -> Iterator[str]:
    """Yield a line for each file in eval/reports that is no part of a complete report, and for each report that is
    older than the code it measures. With `"revalidated": {"commit": ..., "reason": ...}` in its JSON file, it counts as
    measured at that commit."""
    found = reports(root)
    for path in sorted((root / REPORTS).glob("*")):
        if not any(path.name.startswith(known.stem) for known in found):
            yield f"{path.name} belongs to no report YYYY-MM-DD_HHMMSS_topic.json"
    for path, report in found.items():
        since = report | report.get("revalidated", {"reason": "is new"})
        needed = (*NEEDED, "reason", *["drawing"] * ("picture" in report))
        if missing := [key for key in needed if not since.get(key)]:
            yield f"{path.name} has no {', '.join(missing)}"
            continue
        for commit in since["commit"].split(", "):
            if commit.endswith("-dirty"):
                yield f"{path.name} was measured with uncommitted changes of what it measures; measure again"
            elif git(root, "cat-file", "-e", commit) is None:
                yield f"{path.name} was measured at {commit}, which is unknown here; fetch it, or measure again"
            elif changed := changed_since(root, commit, report["measures"]):
                advice = 'if no figure can have changed, add "revalidated": {"commit": ..., "reason": ...} to the file'
                yield f"{path.name} is older than {', '.join(changed)}; measure again, or, {advice}"
