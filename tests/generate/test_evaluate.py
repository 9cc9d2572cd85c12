"""Benchmarks of a local task file against direct scoring; needs the extra `eval`."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_model import make_model, make_reference

from kimi_jax.data.tokenizers import ByteTokenizer
from kimi_jax.errors import UserError
from kimi_jax.generate import evaluate as evaluation
from kimi_jax.generate.api import Generator, Settings
from kimi_jax.interop.hf_export import export_model

TOLERANCE = 1e-6  # relative, of sums of log-likelihoods, float32; measured 9.0e-8
SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate.py"
TASKS = Path(__file__).with_name("tasks")
WORDS = {
    "blue": ["sky", "grass", "a long road", "n"],
    "wet": ["fire", "rain", "sand", "x"],
    "open": ["door", "it", "y"],
}

needs_harness = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs the extra eval"),
]


def test_a_mistyped_checkpoint_is_told_before_tasks_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "check_harness", lambda: None)
    monkeypatch.setattr(evaluation, "find_tasks", None)
    with pytest.raises(UserError, match=f"^checkpoint {tmp_path / 'typo'}: is no directory$"):
        evaluation.evaluate(tmp_path / "typo", ["any"])


def test_a_missing_harness_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm_eval is not installed; pip install 'kimi_jax\[eval\]'"):
        evaluation.evaluate(tmp_path, ["any"])


def test_an_output_that_cannot_be_is_refused_first(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: name)
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=r"output .*: cannot be made a directory"):
            evaluation.evaluate(tmp_path, ["any"], output=output)
    with pytest.raises(UserError, match="num_fewshot=-1: must be at least 0"):
        evaluation.evaluate(tmp_path, ["any"], num_fewshot=-1)


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    command = [sys.executable, SCRIPT, "--include", TASKS, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def model():
    return make_model(ByteTokenizer.vocab_size, ByteTokenizer())


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The checkpoint, and documents; what follows "blue" is what the model itself says."""
    folder = tmp_path_factory.mktemp("evaluate")
    export_model(model, folder / "public")
    generator = Generator(model)
    with (folder / "words.jsonl").open("w") as file:
        for word, choices in WORDS.items():
            greedy = generator.generate([word], Settings(8), stop=["."]).completions[0].text if word == "blue" else "no"
            file.write(json.dumps({"word": word, "choices": choices, "answer": 1, "greedy": greedy}) + "\n")
    return folder


class TestHarness:
    pytestmark = needs_harness

    def test_figures_are_those_of_direct_scoring(self, model, folder):
        tasks = "tiny_choices,tiny_rolling,tiny_answers"
        out = run_script(folder, "--checkpoint", "public", "--tasks", tasks, "--output", "out", "--batch-size", "4")
        assert out.returncode == 0, out.stderr
        stored = json.loads((folder / "out" / "results.json").read_text())
        score = make_reference(model, length=64)
        encode = ByteTokenizer().encode
        sums, bits, num_bytes, contexts, continuations = {}, 0.0, 0, 0, 0
        for word, choices in WORDS.items():
            context = encode(f"Which word follows {word}?")
            whole = [np.append(context, encode(f" {choice}")) for choice in choices]
            sums[word] = np.array([score(tokens)[1][len(context) :].sum() for tokens in whole])
            contexts += len(context)
            continuations += sum(len(choice) for choice in choices)
            text = f"{word} and {choices[0]}"
            bits -= score(np.append(ByteTokenizer.eos_id, encode(text)))[1].sum() / np.log(2)
            num_bytes += len(text)
        lengths = {word: [len(choice) for choice in choices] for word, choices in WORDS.items()}
        results = stored["results"]
        assert results["tiny_choices"]["acc,none"] == np.mean([sums[w].argmax() == 1 for w in WORDS])
        assert results["tiny_choices"]["acc_norm,none"] == np.mean(
            [(sums[w] / lengths[w]).argmax() == 1 for w in WORDS]
        )
        assert results["tiny_answers"]["exact_match,none"] == pytest.approx(1 / 3)
        assert results["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits / num_bytes, rel=TOLERANCE)
        rolled = num_bytes + len(WORDS)
        assert stored["tokens"]["run"] == contexts + continuations + rolled
        assert (
            stored["tokens"]["requested"]
            == sum(len(f"Which word follows {w}?") + n for w in WORDS for n in lengths[w]) + rolled
        )
        assert "tiny_rolling" in out.stdout
        assert "tokens run for requests of" in out.stdout

    def test_log_likelihoods_are_those_of_direct_scoring(self, model):
        from lm_eval.api.instance import Instance

        from kimi_jax.generate.lm_eval_adapter import HarnessModel

        pairs = [("one two", " three"), ("one two ", "three"), ("", "five"), ("  ", "six"), ("one two", "")]
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        score = make_reference(model, length=64)
        encode = ByteTokenizer().encode
        expected = []
        for context, text in pairs:
            before = context.rstrip()
            tokens = encode(before) if before else np.array([ByteTokenizer.eos_id])
            whole = np.append(tokens, encode((context + text)[len(before) :]))
            logits, likelihood = score(whole)
            best = logits.argmax(-1)[len(tokens) - 1 : -1]
            expected.append((likelihood[len(tokens) :].sum(), (best == whole[len(tokens) :]).all()))
        got = HarnessModel(model, batch_size=4).loglikelihood(requests)
        for (likelihood, greedy), (want, want_greedy) in zip(got, expected, strict=True):
            assert likelihood == pytest.approx(want, rel=TOLERANCE)
            assert greedy == want_greedy

    def test_mistakes_are_one_line(self, folder):
        wrong = run_script(folder, "--checkpoint", "public", "--tasks", "no_such_task")
        assert wrong.returncode == 2
        assert wrong.stderr.splitlines()[-1] == (
            "error: task 'no_such_task': lm_eval has none of this name; see `lm_eval ls tasks`"
        )
        (folder / "empty").mkdir()
        lost = run_script(folder / "empty", "--checkpoint", "../public", "--tasks", "tiny_choices")
        assert lost.returncode == 2
        assert re.match(r"error: tasks tiny_choices: .*words\.jsonl", lost.stderr.splitlines()[-1])


@pytest.mark.parametrize("stop", [["."], ["\n\n", "b"]])
def test_a_stop_text_ends_a_row(stop):
    """Byte by byte, a stop text is found where it ends, and it is not part of the text."""
    from kimi_jax.generate.api import _Row

    row = _Row(ByteTokenizer(), (), [text.encode() for text in stop])
    text = f"aé{stop[-1]}c"
    for byte in text.encode():
        row.add(byte)
    completion = row.complete()
    assert (completion.text, completion.ended_by) == ("aé", "stop")
    assert len(completion.token_ids) == len(f"aé{stop[-1]}".encode())
