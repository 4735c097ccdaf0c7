"""The rules of CONTRIBUTING.md for imports, and their picture there; the marks of the tests; mutations of the core."""

from __future__ import annotations

import ast
import re
import tomllib

from helpers import REPOSITORY
from stress.mutate import mutations

TOP = ("run", "train", "evaluate", "dataset", "coconut", "curriculum", "config", "utils")


def core_modules() -> dict[str, set[str]]:
    """Map each module of the core to the core modules that it imports."""
    paths = {f"components.{path.stem}": path for path in (REPOSITORY / "components").glob("*.py")}
    paths |= {path.stem: path for path in REPOSITORY.glob("*.py")}
    imports = {}
    for module, path in paths.items():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imports[module] = names & paths.keys()
    return imports


IMPORTS = core_modules()


def reachable(module: str) -> set[str]:
    """Return the modules that a module imports, directly or not."""
    found, left = set(), list(IMPORTS[module])
    while left:
        if (other := left.pop()) not in found:
            found.add(other)
            left += IMPORTS[other]
    return found


def arrows() -> list[str]:
    """Return the imports as lines of a mermaid graph, without those that longer paths imply."""
    lines = []
    for module in sorted(IMPORTS, key=lambda name: (name not in TOP, name)):
        for other in sorted(IMPORTS[module]):
            if not any(other in reachable(third) for third in IMPORTS[module] - {other}):
                lines.append(f"    {module.removeprefix('components.')} --> {other.removeprefix('components.')}")
    return lines


def test_top_level_has_the_eight_modules_of_the_paper():
    assert {path.stem for path in REPOSITORY.glob("*.py")} == set(TOP)


def test_components_import_only_config_curriculum_and_each_other():
    for module, imports in IMPORTS.items():
        if module.startswith("components."):
            assert {name for name in imports if not name.startswith("components.")} <= {"config", "curriculum"}, module


def test_imports_have_no_cycle():
    assert [module for module in IMPORTS if module in reachable(module)] == []


def test_no_core_file_is_longer_than_450_lines():
    for module in IMPORTS:
        path = REPOSITORY / f"{module.replace('.', '/')}.py"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, module


def test_contributing_shows_the_imports():
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = page.partition("graph LR\n")[2].partition("```")[0].splitlines()
    assert shown == arrows(), "replace the graph in CONTRIBUTING.md by:\n" + "\n".join(arrows())


def test_marks_are_declared_in_pyproject():
    """Not by plugins alone, such as pytest-timeout: without them --strict-markers would refuse the tests."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"][
        "ini_options"
    ]
    declared = {re.match(r"\w+", line)[0] for line in settings["markers"]} | {"parametrize", "skipif", "skip", "xfail"}
    texts = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert {mark for text in texts for mark in re.findall(r"pytest\.mark\.(\w+)", text)} <= declared


def test_stress_mutations_still_find_their_lines_and_tests():
    """tests/stress/mutate.py runs them. Where a line or test has changed, change its row there."""
    for test, file, old, new in mutations():
        path, _, name = test.partition("::")
        text = (REPOSITORY / file).read_text(encoding="utf-8")
        assert old != new and text.count(old) == 1, (file, old)
        compile(text.replace(old, new), file, "exec")  # a syntax error would fail any test
        assert f"def {name.partition('[')[0]}(" in (REPOSITORY / "tests" / path).read_text(encoding="utf-8"), test
