"""lm-evaluation-harness as part of a training run; needs the extra `eval`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TASKS = Path(__file__).with_name("tasks")
NAMES = ["tiny_choices", "tiny_rolling", "tiny_answers"]
FIGURES = {
    "tiny_choices": ("acc", "acc_norm"),
    "tiny_rolling": ("bits_per_byte",),
    "tiny_answers": ("exact_match",),
}
WORDS = [
    {"word": "wet", "choices": ["fire", "rain", "sand"], "answer": 1, "greedy": "no"},
    {"word": "open", "choices": ["door", "it"], "answer": 0, "greedy": ""},
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs the extra eval"),
]


def make_config(**evaluation) -> dict:
    kda = {"kind": "kda", "num_heads": 2, "key_dim": 16, "value_dim": 16}
    mla = {"kind": "mla", "num_heads": 2, "nope_dim": 8, "rope_dim": 8, "value_dim": 16, "latent_dim": 16}
    bench = {"kind": "lm_eval", "tasks": NAMES, "include": str(TASKS), "every": 2} | evaluation
    return {
        "base": str(ROOT / "experiments" / "quickstart.yaml"),
        "model": {"model_dim": 32, "num_layers": 2, "pattern": ["kda", "mla"], "mixers": {"kda": kda, "mla": mla}}
        | {"ffn": {"kind": "dense", "hidden_dim": 32}, "dtype": "float32"},
        "data": {"kind": "stdlib", "seq_len": 64},
        "optim": {"schedule": {"kind": "constant", "warmup_steps": 0}},
        "train": {"steps": 4, "batch_size": 8, "log_every": 1, "checkpoints": {"every": 1, "keep": 10}}
        | {"validation": {"every": 1, "batches": 1}, "evaluations": {"bench": bench}},
    }


def run(script: str, *arguments: str, folder: Path, devices: int = 1) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    environment |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, ROOT / "scripts" / script, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def train(folder: Path, name: str, devices: int = 1, **evaluation) -> subprocess.CompletedProcess:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(make_config(**evaluation)))
    return run("train.py", f"{name}.yaml", "--run-dir", name, folder=folder, devices=devices)


def read(folder: Path, name: str) -> list[dict]:
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "tokens_per_s"} for record in records]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "words.jsonl").write_text("".join(json.dumps(word) + "\n" for word in WORDS))
    done = train(folder, "one")
    assert done.returncode == 0, done.stderr
    return folder


def figures(record: dict) -> dict[str, float]:
    return {key: value for key, value in record.items() if key.startswith("bench_")}


def test_figures_are_those_of_the_checkpoint_of_the_step(folder):
    records = read(folder, "one")
    assert [bool(figures(record)) for record in records] == [False, True, False, True]
    for step in (2, 4):
        tasks = ["--tasks", ",".join(NAMES), "--include", str(TASKS), "--step", str(step)]
        done = run("evaluate.py", "--checkpoint", "one", *tasks, "--output", f"at-{step}", folder=folder)
        assert done.returncode == 0, done.stderr
        results = json.loads((folder / f"at-{step}" / "results.json").read_text())["results"]
        expected = {f"bench_{task}_{m}": results[task][f"{m},none"] for task, names in FIGURES.items() for m in names}
        assert figures(records[step - 1]) == expected
    assert records[1]["bench_tiny_rolling_bits_per_byte"] != records[3]["bench_tiny_rolling_bits_per_byte"]


def test_training_goes_on_as_without_it(folder):
    done = train(folder, "without", tasks=["tiny_choices"], every=100)
    assert done.returncode == 0, done.stderr
    without_figures = lambda name: [{k: v for k, v in r.items() if k not in figures(r)} for r in read(folder, name)]
    assert without_figures("without") == without_figures("one")


def test_several_devices_give_the_figures_of_one(folder):
    done = train(folder, "two", devices=2)
    assert done.returncode == 0, done.stderr
    for got, want in zip(read(folder, "two"), read(folder, "one"), strict=True):
        assert figures(got) == pytest.approx(figures(want), rel=3e-5)  # other sums; measured 5.6e-6


def test_mistakes_are_one_line_before_anything_is_compiled(folder):
    cases = {
        "unknown": (
            {"tasks": ["no_such_task"]},
            "task 'no_such_task': lm_eval has none of this name",
        ),
        "include": ({"include": "nowhere"}, "include nowhere: is no directory"),
        "network": ({"tasks": ["arc_easy"]}, "tasks arc_easy: "),
    }
    for name, (evaluation, line) in cases.items():
        done = train(folder, name, **evaluation)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(f"error: train.evaluations.bench: {line}")
        assert "compiled" not in done.stdout
        assert not (folder / name / "metrics.jsonl").exists()
