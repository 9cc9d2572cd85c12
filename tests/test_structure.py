"""The shape of the project itself: imports point down, every experiment file is a valid config."""

import ast
import json
import math
from pathlib import Path

import jax
import pytest

from kimi_jax.config.load import json_schema, load
from kimi_jax.config.train import RunConfig
from kimi_jax.data.synthetic.tasks import TASKS
from kimi_jax.experiments.sweep import load_sweep
from kimi_jax.models import decoder
from kimi_jax.models.counts import count_parameters

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
    "train": {*BASE, "layers", "models", "parallel", "data", "kernels"},
    "generate": {*BASE, "layers", "models", "parallel", "data", "interop", "train", "kernels"},
    "interop": {*BASE, "layers", "models", "parallel", "data", "train"},
    "experiments": {*BASE, "models", "parallel", "data", "train", "generate", "interop", "kernels"},
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
SWEEPS = [path for path in EXPERIMENTS if path.stem.endswith("sweep")]


def task_vocab_size(data) -> int:
    return TASKS[type(data)].vocab_size(data) if type(data) in TASKS else 0


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "experiments"))


@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if path not in SWEEPS], ids=name_of)
def test_every_experiment_file_is_valid(path):
    load(path, [], RunConfig)


@pytest.mark.parametrize("path", SWEEPS, ids=name_of)
def test_every_run_of_every_sweep_is_valid(path):
    """And its parameters, counted in closed form, are those that the model would make."""
    runs = load_sweep(path)
    assert all(run.config.model.vocab_size >= task_vocab_size(run.config.data) for run in runs)
    for model in {run.config.model.model_dump_json(): run.config.model for run in runs}.values():
        made = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(decoder.abstract(model)[1:]))
        assert made == count_parameters(model).total


def test_the_schema_for_editors_is_up_to_date():
    stored = json.loads((ROOT / "experiments" / "schema.json").read_text(encoding="utf-8"))
    assert stored == json_schema(RunConfig), "run `make schema`"


def test_only_configs_and_results_under_experiments():
    odd = [
        path
        for path in (ROOT / "experiments").rglob("*")
        if path.is_file() and path.suffix not in {".yaml", ".md", ".json", ".png", ".csv"}
    ]
    assert not odd
