"""Sweeps: which runs a file stands for, and that each of them is finished exactly once whatever is killed."""

import collections
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import tiny_run

from kimi_jax.config.sweep import SweepConfig
from kimi_jax.errors import UserError
from kimi_jax.experiments import launch
from kimi_jax.experiments.launch import Local
from kimi_jax.experiments.plan_sweep import batch_script, plan, plan_table
from kimi_jax.experiments.resources import Resources
from kimi_jax.experiments.sweep import digest, group_runs, load_sweep, make_runs_dir
from kimi_jax.train.metrics import read_metrics
from kimi_jax.train.run_dir import IN_USE
from kimi_jax.train.signals import StopRequest

ROOT = Path(__file__).parents[2]
DEBUG = ROOT / "experiments" / "sizes" / "debug.yaml"

# Takes the arguments of scripts/train.py. Behaves as it does towards a launcher: holds its directory, goes on from
# what is there, leaves the last checkpoint at the end, and notes each end in a file beside the runs. A SIGTERM, which
# it gets when its launcher is killed, falls before both or after both: else an end would be noted and come again.
STAND_IN = """
import fcntl, pathlib, signal, sys, time, yaml
config, _, run_dir = sys.argv[1:]
steps = yaml.safe_load(open(config))["train"]["steps"]
run_dir = pathlib.Path(run_dir)
run_dir.mkdir(parents=True, exist_ok=True)
lock = open(run_dir / ".lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit("error: another process is training in it")
if "mla" in run_dir.name and not (run_dir.parent / "mended").exists():
    sys.exit("starting\\nerror: the data is away\\nmore")
if (run_dir / "checkpoints" / str(steps)).is_dir():
    (run_dir.parent / "again").touch()
    sys.exit()  # finished, nothing to do
time.sleep(0.05)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
with open(run_dir.parent / "ends", "a") as ends:
    ends.write(run_dir.name + "\\n")
(run_dir / "checkpoints" / str(steps)).mkdir(parents=True)
"""


def write(folder: Path, **sweep) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": str(DEBUG), **sweep}, sort_keys=False))
    return path


def test_a_long_name_leaves_room_for_what_checkpoints_append(tmp_path):
    (run,) = load_sweep(write(tmp_path, runs={"a" * 300: {}}))
    assert len(run.name) == 120 + 1 + 8


def test_a_text_means_names_not_digits(tmp_path):
    run, other = load_sweep(write(tmp_path, runs={"mla": {}, "head": {"train.seed": 1}}))
    (digits,) = {run.name.rpartition("-")[2]}
    assert run.is_meant("ml") and not other.is_meant("ml")
    assert run.is_meant(run.name) and not any(run.is_meant(text) for text in (digits, f"-{digits[0]}"))


def names(path: Path) -> list[str]:
    return [run.name.rpartition("-")[0] for run in load_sweep(path)]


def test_the_runs_come_in_the_order_of_the_file(tmp_path):
    path = write(
        tmp_path,
        runs={"kda": {}, "head": {"model.mixers.kda.decay": {"kind": "head"}}},
        grid={"optim.peak_lr": [1e-3, 0.003]},
        zip={"data.seq_len": [32, 64], "train.batch_size": [8, 4]},
        seeds=[0, 7],
        exclude=[{"runs": "head", "data.seq_len": 64}, {"train.seed": 7, "optim.peak_lr": 0.003}],
    )
    assert names(path) == [
        "kda-peak_lr=0.001-seq_len=32-batch_size=8-seed=0",
        "kda-peak_lr=0.001-seq_len=32-batch_size=8-seed=7",
        "kda-peak_lr=0.001-seq_len=64-batch_size=4-seed=0",
        "kda-peak_lr=0.001-seq_len=64-batch_size=4-seed=7",
        "kda-peak_lr=0.003-seq_len=32-batch_size=8-seed=0",
        "kda-peak_lr=0.003-seq_len=64-batch_size=4-seed=0",
        "head-peak_lr=0.001-seq_len=32-batch_size=8-seed=0",
        "head-peak_lr=0.001-seq_len=32-batch_size=8-seed=7",
        "head-peak_lr=0.003-seq_len=32-batch_size=8-seed=0",
    ]
    config = load_sweep(path)[-3].config
    assert config.model.mixers["kda"].decay.kind == "head" and config.data.seq_len == 32
    assert (config.train.batch_size, config.train.seed, config.data.shuffle_seed) == (8, 0, 0)


def test_names_are_of_the_configs_alone(tmp_path):
    (tmp_path / "a").mkdir()
    one = load_sweep(write(tmp_path, grid={"optim.peak_lr": [1e-3, 2e-3]}, seeds=[3, 4]))
    two = load_sweep(write(tmp_path / "a", seeds=[4, 3], grid={"optim.peak_lr": ["2e-3", 1e-3]}))
    assert {run.name for run in one} == {run.name for run in two}
    longer = one[0].config.model_copy(update={"train": one[0].config.train.model_copy(update={"steps": 999})})
    assert digest(longer) == digest(one[0].config)  # the same run, going on
    assert len({digest(run.config) for run in one}) == 4


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"grid": {"optim.peak_lrr": [1]}}, "optim.peak_lrr: unknown key; did you mean 'peak_lr'?"),
        ({"grid": {"optim.peak_lr": []}}, "grid.optim.peak_lr: got"),
        ({"grid": {"optim.peak_lr": [1e-3, "fast"]}}, "(run peak_lr=fast)"),
        (
            {"zip": {"data.seq_len": [2, 4], "train.batch_size": [1]}},
            "lists must have one length, but",
        ),
        ({"grid": {"train.seed": [1]}, "seeds": [1]}, "seeds: sets train.seed"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"seeds": [-1]}, "seeds.0: got -1"),
        ({"runs": {"a": {"optim.peak_lr": 1}}, "grid": {"optim.peak_lr": [2]}}, "runs.a: optim.peak_lr is swept"),
        ({"runs": {"a": {}, "b": {}}}, "have the same config"),
        ({"runs": {"a b": {}, "a_b": {"train.loss_chunk": 8}}}, "two runs would have the name a_b-"),
        ({"grid": {"train.seed": [1], "seed": [2]}}, "seed: unknown key"),
        ({"runs": {"a": {}}, "exclude": [{"runs": "c"}]}, "matches no run of the sweep"),
        ({"runs": {"a": {}}, "exclude": [{"arm": "a"}]}, "'arm' is not swept"),
        ({"runs": {"a": {}}, "exclude": [{"runs": "a"}]}, "leaves no run"),
        ({"gird": {}}, "gird: unknown key; did you mean 'grid'?"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: no such config file"),
        ({"together": {"over": ["seeds"]}, "grid": {"optim.peak_lr": [1e-3]}}, "together.over: 'seeds' is not swept"),
        ({"together": {"over": ["data.seq_len"]}}, "together.over.0: got 'data.seq_len'"),
    ],
)
def test_mistakes_are_named(tmp_path, sweep, message):
    with pytest.raises(UserError) as caught:
        load_sweep(write(tmp_path, **sweep))
    assert message in str(caught.value)
    assert all("\n" not in problem for problem in caught.value.problems)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(0, 9), max_size=3, unique=True),
    st.integers(0, 3),
)
def test_every_combination_comes_once(lengths, seeds, num_arms):
    sweep = SweepConfig(
        base="x", runs={str(i): {} for i in range(num_arms)}, grid={"a.b": lengths, "c": [0, 1]}, seeds=seeds
    )
    points = [json.dumps((point.arm, dict(point.values))) for point in sweep.points()]
    assert len(points) == len(set(points)) == sweep.size == 2 * len(lengths) * max(len(seeds), 1) * max(num_arms, 1)


# ------------------------------------------------------------------ launching
@pytest.fixture
def stand_in(tmp_path) -> tuple[str, ...]:
    script = tmp_path / "train.py"
    script.write_text(STAND_IN)
    return sys.executable, str(script)


def test_failed_runs_are_named_and_finished_ones_are_skipped(tmp_path, stand_in):
    runs = load_sweep(write(tmp_path, runs={"kda": {}, "mla": {"model.pattern": ["mla"]}}, seeds=[0, 1]))
    launcher = Local(tmp_path / "runs", stand_in, at_once=2)
    outcomes = {o.run.name: o for o in launcher.launch(runs, StopRequest(), lambda outcome: None)}
    states = [(outcomes[run.name].state, outcomes[run.name].cause) for run in runs]
    assert states == [("finished", "")] * 2 + [("failed", "the data is away")] * 2
    (tmp_path / "runs" / "mended").touch()
    again = launcher.launch(runs, StopRequest(), lambda outcome: None)
    assert collections.Counter(o.state for o in again) == {"finished before": 2, "finished": 2}
    ends = (tmp_path / "runs" / "ends").read_text().split()
    assert sorted(ends) == sorted(run.name for run in runs)
    finished = plan_table(plan(runs, tmp_path / "runs"), tmp_path / "runs", at_once=1)
    assert list(finished.columns[4].cells) == ["finished"] * 4


def test_a_folder_that_cannot_be_written_is_one_line_before_anything_starts(tmp_path):
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "file" / "runs", "Not a directory"), (Path("/proc/runs"), "No such file")):
        with pytest.raises(UserError, match=rf"^--runs-dir {path}: cannot be written: {why}"):
            make_runs_dir(path)
    make_runs_dir(tmp_path / "new" / "runs")
    assert (tmp_path / "new" / "runs" / "sweep").is_dir()


def test_a_stop_signal_ends_the_running_ones(tmp_path, stand_in):
    runs = load_sweep(write(tmp_path, grid={"train.seed": list(range(20))}))
    stop = StopRequest()

    def report(outcome):
        stop.signal = signal.SIGTERM

    outcomes = Local(tmp_path / "runs", stand_in, at_once=2).launch(runs, stop, report)
    assert outcomes[0].state == "finished" and len(outcomes) <= 3


def test_a_run_that_has_gone_further_is_finished(tmp_path):
    (run,) = load_sweep(write(tmp_path, runs={"a": {}}))
    checkpoints = run.directory(tmp_path).checkpoints
    (checkpoints / f"{run.config.train.steps}.orbax-checkpoint-tmp-0").mkdir(parents=True)
    assert not run.is_finished(tmp_path)
    (checkpoints / str(run.config.train.steps + 5)).mkdir()
    assert run.is_finished(tmp_path)


def test_a_run_that_another_launcher_looked_at_is_tried_again(tmp_path, stand_in, monkeypatch):
    """The lock is taken when the process starts and free when the launcher asks why it failed."""
    monkeypatch.setattr(launch, "BUSY_S", 0.0)
    (run,) = load_sweep(write(tmp_path, runs={"a": {}}))
    script = tmp_path / "first_time_held.py"
    script.write_text(
        "import pathlib, runpy, sys\n"
        f"seen = pathlib.Path({str(tmp_path / 'seen')!r})\n"
        "if not seen.exists():\n"
        "    seen.touch()\n"
        f"    sys.exit('error: run directory x: {IN_USE}')\n"
        f"runpy.run_path({stand_in[1]!r})\n"
    )
    launcher = Local(tmp_path / "runs", (sys.executable, str(script)))
    (outcome,) = launcher.launch([run], StopRequest(), lambda o: None)
    assert outcome.state == "finished"
    assert IN_USE in (tmp_path / "runs" / "sweep" / f"{run.name}.log").read_text(), "output of earlier starts stays"


def test_a_run_that_ends_while_it_is_looked_at_is_not_started_again(tmp_path, monkeypatch):
    """As one does that a killed launcher has left behind: its directory is free once its last checkpoint is there."""
    (run,) = load_sweep(write(tmp_path, runs={"a": {}}))

    def ends(run, runs_dir):
        (run.directory(runs_dir).checkpoints / str(run.config.train.steps)).mkdir(parents=True)
        return False

    monkeypatch.setattr(launch, "_is_held", ends)
    (outcome,) = Local(tmp_path / "runs", ("never",)).launch([run], StopRequest(), lambda o: None)
    assert outcome.state == "finished before"


def test_each_process_gets_one_gpu(tmp_path):
    runs = load_sweep(write(tmp_path, grid={"train.seed": list(range(4))}))
    show = (sys.executable, "-c", "import os, sys; print('error:', os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(1)")
    outcomes = Local(tmp_path / "runs", show, at_once=2, devices=("4", "7")).launch(runs, StopRequest(), lambda o: None)
    assert {outcome.cause for outcome in outcomes} == {"4", "7"}


def test_processes_of_one_gpu_share_its_memory(tmp_path, monkeypatch):
    for name in launch.SAYS_MEMORY:
        monkeypatch.delenv(name, raising=False)
    environment = Local(tmp_path, (), at_once=5, devices=("4", "7"))._environment
    assert environment("4") == {"CUDA_VISIBLE_DEVICES": "4", "XLA_CLIENT_MEM_FRACTION": "0.300"}
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert environment("4") == {"CUDA_VISIBLE_DEVICES": "4"}, "they take what they need"
    assert Local(tmp_path, ())._environment(None) == {}


def test_the_batch_script_runs_the_same_commands(tmp_path, stand_in):
    runs = load_sweep(write(tmp_path, grid={"train.seed": [0, 1, 2]}))
    asked = Resources(minutes=90, save_s=60, options={"partition": "long"})
    script = batch_script(runs, tmp_path / "with space", stand_in, asked, at_once=2)
    assert "#SBATCH --array=0-2%2\n#SBATCH --time=90 --gpus=1" in script and "#SBATCH --partition=long" in script
    assert "--signal=B:TERM@60" in script, "the training is the batch process itself"
    for task in range(3):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", "-c", script], env=environment, check=True)
    assert all(run.is_finished(tmp_path / "with space") for run in runs)
    assert batch_script(runs, tmp_path / "with space", stand_in, asked) == "# every run is finished"


def test_groups_are_runs_that_differ_in_nothing_else(tmp_path, stand_in):
    """And each is one process: scripts/train_together.py in the place of scripts/train.py."""
    grid = {"data.seq_len": [32, 64], "optim.peak_lr": [1e-3, 2e-3]}
    path = write(tmp_path, grid=grid, seeds=[0, 1], together={"over": ["optim.peak_lr"]})
    units = group_runs(path, load_sweep(path))
    assert [unit.name for unit in units] == [f"seq_len={n}-seed={seed}" for n in (32, 64) for seed in (0, 1)]
    assert all({run.config.optim.peak_lr for run in unit.runs} == {1e-3, 2e-3} for unit in units)
    alone, together = Path(stand_in[-1]), Path(stand_in[-1]).with_name("train_together.py")
    together.write_text(
        "import pathlib, subprocess, sys\n"
        "from kimi_jax.experiments.sweep import read_group\n"
        "group, _, runs = map(pathlib.Path, sys.argv[1:])\n"
        "group = read_group(group)\n"
        f"[subprocess.run(run.prepare(runs, (sys.executable, {str(alone)!r})), check=True) for run in group.runs]\n"
    )
    runs_dir = tmp_path / "runs"
    path.write_text("changed: meanwhile")
    for state in ("finished", "finished before"):
        outcomes = Local(runs_dir, stand_in, at_once=2).launch(units, StopRequest(), lambda outcome: None)
        assert collections.Counter(outcome.state for outcome in outcomes) == {state: 4}
    ends = (runs_dir / "ends").read_text().split()
    assert collections.Counter(ends) == {run.name: 1 for unit in units for run in unit.runs}
    run = units[0].runs[0]
    shutil.rmtree(run.directory(runs_dir).checkpoints)
    assert not units[0].is_finished(runs_dir) and units[0].unfinished(runs_dir) == [run]
    run.directory(runs_dir).mark_ended(7)
    assert units[0].is_finished(runs_dir), "ended early is finished, too"


KILLED = 3


def launch_and_kill(start_process, command: list[str], num_runs: int, num_finished: Callable[[], int]) -> None:
    """Starts a launcher, kills it with its processes in all states, and so on; lets the last one come to the end."""
    for kill in range(KILLED):
        process = start_process(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while num_finished() < num_runs * (kill + 1) // (KILLED + 2):
            assert process.poll() is None, f"launcher {kill} ended with {process.returncode} before it was killed"
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start_process(command, cwd=ROOT, stdout=subprocess.DEVNULL).wait() == 0


def test_killed_launchers_lose_nothing_and_repeat_nothing(tmp_path, stand_in, start_process):
    """200 members, the launcher killed three times with its processes left behind, then run to the end."""
    path = write(tmp_path, grid={"train.seed": list(range(100)), "optim.peak_lr": [1e-3, 2e-3]})
    code = (
        "import sys; from pathlib import Path\n"
        "from kimi_jax.experiments.launch import Local\n"
        "from kimi_jax.experiments.sweep import load_sweep\n"
        "from kimi_jax.train.signals import StopRequest\n"
        f"runs = load_sweep(Path({str(path)!r}))\n"
        f"launcher = Local(Path({str(tmp_path / 'runs')!r}), {stand_in!r}, at_once=8)\n"
        "launcher.launch(runs, StopRequest(), lambda outcome: None)\n"
    )
    ends = tmp_path / "runs" / "ends"
    ended = lambda: ends.read_text().split() if ends.exists() else []
    launch_and_kill(start_process, [sys.executable, "-c", code], 200, lambda: len(ended()))
    assert collections.Counter(ended()) == {run.name: 1 for run in load_sweep(path)}
    assert not (tmp_path / "runs" / "again").exists(), "a finished run was started"


@pytest.mark.slow
def test_a_sweep_of_real_runs(tmp_path):
    """The command itself over the debug model: a failing run is named, the other finishes; then nothing is left."""
    path = write(tmp_path, runs={"good": {}, "bad": {"data": {"kind": "records", "seq_len": 64, "train": "/nowhere"}}})
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), str(path), "--runs-dir", str(tmp_path / "runs")]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 1 and "1 finished, 1 failed" in first.stdout and "/nowhere" in first.stdout
    again = subprocess.run([*command, "--only", "good"], capture_output=True, text=True)
    assert again.returncode == 0 and "1 finished before" in again.stdout
    dry = subprocess.run([*command, "--dry-run", "--only", "good"], capture_output=True, text=True)
    assert "0 PFLOP left" in dry.stdout, shlex.join(command)


NUM_REAL = int(os.environ.get("KIMI_JAX_SWEEP_RUNS", "40"))


@pytest.mark.slow
def test_real_runs_of_a_killed_launcher_finish_once(tmp_path, start_process):
    """The command itself: killed three times with its processes in all states, then run to the end."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_run(steps=2)))
    path = write(tmp_path, seeds=list(range(NUM_REAL)), base="tiny.yaml")
    runs, runs_dir = load_sweep(path), tmp_path / "runs"
    command = [sys.executable, "scripts/sweep.py", str(path), "--runs-dir", str(runs_dir), "--at-once", "2"]
    launch_and_kill(start_process, command, NUM_REAL, lambda: sum(run.is_finished(runs_dir) for run in runs))
    for run in runs:
        directory = run.directory(runs_dir)
        assert directory.log.read_text().count("finished 2 steps") == 1, run.name
        assert [record["step"] for record in read_metrics(directory.metrics)] == [1, 2]
    starts = [path.read_text().count("starts, 2 steps") for path in (runs_dir / "sweep").glob("*.log")]
    print(f"{len(runs)} runs, {sum(starts)} starts")
    assert len(starts) == NUM_REAL
