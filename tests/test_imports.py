"""Imports point one way, and folders named like PyPI packages do not shadow them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vlmaccel"
# a module may import from its own level and from those to its right of it; methods and adapters never from each other's
# left: methods know tensors, adapters know model classes
LEVELS = [
    {"cli"},
    {"pipelines", "serving"},
    {"evals", "training"},
    {"plots_groups"},
    {"plots"},
    {"patching"},
    {"stats"},
    {"adapters"},
    {"methods"},
    {"hooks"},
    {"run"},
    {"cache"},
    {"reduction", "flops", "_version"},
    {"kernels"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}


def part(module):
    """The top-level part of the package that a dotted name is in; None for the package itself."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "vlmaccel" and len(pieces) > 1 else None


def imports(path):
    """Parts of the package that a file imports when it runs (what is only for the type checker does not count)."""
    tree = ast.parse(path.read_text())
    checking = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in checking:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (p for p in map(part, names) if p in LEVEL)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    relative = path.relative_to(PACKAGE)
    me = relative.parts[0].removesuffix(".py")
    if me == "__init__":
        return
    for other in imports(path):
        assert LEVEL[other] >= LEVEL[me], f"{relative} imports vlmaccel.{other}"
        if me == "kernels":
            assert other == "kernels"


def test_every_part_has_a_level():
    parts = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or any(p.glob("*.py"))}
    assert parts - {"__init__"} == set(LEVEL) & parts
    assert parts - {"__init__"} <= set(LEVEL)


def test_folders_at_the_root_shadow_nothing():
    """With the repository on sys.path, `import kernels` finds no package of ours, and transformers still loads models."""
    code = (
        "import importlib.util as u, transformers;"
        "assert all(s is None or s.origin is None for s in map(u.find_spec, ('kernels', 'adapters', 'evals')));"
        "from transformers import LlamaForCausalLM"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True)
