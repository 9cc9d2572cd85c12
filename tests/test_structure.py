"""The shape of the project itself: imports point down, every experiment file is a valid config."""

import ast
import json
from pathlib import Path

import pytest

from kimi_jax.config.load import json_schema, load
from kimi_jax.config.train import RunConfig

ROOT = Path(__file__).parent.parent
PACKAGES = ("kimi_jax", "pallas_kernels")

# What each part may import of ours. `kernels` stands for the public entry of an operator, pallas_kernels.<op>[.api].
BASE = {"types", "errors", "config"}
ALLOWED = {
    "types": set(),
    "errors": set(),
    "config": {"errors"},
    "layers": {*BASE, "kernels"},
    "parallel": {*BASE, "layers", "kernels"},
    "models": {*BASE, "layers", "parallel"},
    "data": BASE,
    "train": {*BASE, "layers", "models", "parallel", "data"},
    "generate": {*BASE, "layers", "models", "parallel", "data", "interop", "train", "kernels"},
    "interop": {*BASE, "layers", "models", "parallel", "data", "train"},
    "experiments": {*BASE, "models", "data", "train", "generate", "interop"},
}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the package"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name.split(".")[0] in PACKAGES}


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_kernels_do_not_import_the_framework():
    for path in _modules("pallas_kernels"):
        assert not [name for name in _imports(path) if name.startswith("kimi_jax")], path


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_down(part):
    for path in _modules(f"kimi_jax/{part}") or [ROOT / "kimi_jax" / f"{part}.py"]:
        if not path.exists():
            continue
        for name in _imports(path):
            package, *rest = name.split(".")
            if package == "pallas_kernels":
                assert "kernels" in ALLOWED[part], f"{path}: only layers, generate and parallel import {name}"
                inside = rest[1:] if rest else []
                private = (
                    inside
                    and inside[0] != "api"
                    and inside[0].islower()
                    and (ROOT / "pallas_kernels" / rest[0] / f"{inside[0]}.py").exists()
                )
                assert not private, f"{path}: imports {name}; use the public entry"
            elif rest:
                assert rest[0] == part or rest[0] in ALLOWED[part], f"{path}: {part} must not import {name}"


def test_the_import_rule_covers_every_part():
    parts = {path.stem if path.is_file() else path.name for path in (ROOT / "kimi_jax").iterdir()}
    assert parts - {"__init__", "__pycache__"} <= set(ALLOWED)


EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT / "experiments")))
def test_every_experiment_file_is_valid(path):
    load(path, [], RunConfig)


def test_the_schema_for_editors_is_up_to_date():
    stored = json.loads((ROOT / "experiments" / "schema.json").read_text(encoding="utf-8"))
    assert stored == json_schema(RunConfig), "run `make schema`"


def test_only_yaml_and_readmes_under_experiments():
    odd = [
        path
        for path in (ROOT / "experiments").rglob("*")
        if path.is_file() and path.suffix not in {".yaml", ".md", ".json", ".png"}
    ]
    assert not odd
