"""Checkpoints: exact round trips while the state is donated, and one clear line for each way to be wrong."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kimi_jax.errors import UserError
from kimi_jax.train.checkpoint import CheckpointStore


def _state(width=3, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"embed": {"weight": jax.random.normal(keys[0], (5, width))}, "norm": {"weight": jnp.ones(width)}}
    opt_state = {"adamw": optax.scale_by_adam().init(params), "muon": {"momentum": {}}}
    return {"params": params, "buffers": {}, "opt_state": opt_state, "step": jnp.int32(7)}


def _save(folder, *steps, state=None, keep=5):
    with CheckpointStore(folder, keep=keep) as store:
        for step in steps:
            store.save(step, state or _state(seed=step), {"next_example": 8 * step}, {"total_tokens": step})
    return folder


def test_round_trip_is_exact(tmp_path):
    folder = _save(tmp_path / "checkpoints", 1, 2, 3, keep=2)
    with CheckpointStore(folder) as store:
        assert store.latest_step == 3
        restored = store.restore(3, jax.eval_shape(_state))
        jax.tree.map(np.testing.assert_array_equal, restored.state, _state(seed=3))
        assert jax.tree.structure(restored.state) == jax.tree.structure(_state())
        assert restored.position == {"next_example": 24} and restored.metadata == {"total_tokens": 3}
        model = store.restore_model(2, jax.eval_shape(_state))
        assert set(model) == {"params", "buffers"}
        jax.tree.map(np.testing.assert_array_equal, model["params"], _state(seed=2)["params"])
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    make = lambda: _state() | {"params": {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}}
    state = make()
    with CheckpointStore(tmp_path / "checkpoints", keep=1) as store:
        store.save(1, state, {}, {"total_tokens": 0})
        for _ in range(5):
            state = advance(state)
        jax.block_until_ready(state)
        store.wait()
        restored = store.restore(1, jax.eval_shape(make)).state
    jax.tree.map(np.testing.assert_array_equal, restored, make())


def test_a_reader_leaves_the_writers_unfinished_files_alone(tmp_path):
    folder = _save(tmp_path / "checkpoints", 1)
    unfinished = folder / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with CheckpointStore(folder) as store:
        assert store.steps == [1]
        with pytest.raises(ValueError, match="opened for reading"):
            store.save(3, _state(), {}, {})
    assert unfinished.is_dir()
    _save(folder, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"], "the next writer removes it"


def test_a_write_that_fails_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    folder = _save(tmp_path / "checkpoints", 1)
    with CheckpointStore(folder, keep=1) as store:

        def fail():
            raise ValueError('RESOURCE_EXHAUSTED: Error writing "params"\nmore')

        with monkeypatch.context() as patch:
            patch.setattr(store._manager, "wait_until_finished", fail)
            with pytest.raises(UserError, match=r'checkpoints .*: cannot be written: RESOURCE_EXHAUSTED: .*"params"$'):
                store.wait()
        assert store.steps == [1]


def test_another_model_is_named_parameter_by_parameter(tmp_path):
    folder = _save(tmp_path / "checkpoints", 1)
    target = jax.eval_shape(lambda: _state(width=4))
    target["params"]["head"] = target["params"].pop("norm")
    with CheckpointStore(folder) as store, pytest.raises(UserError) as error:
        store.restore(1, target)
    assert error.value.problems[1:] == (
        "  params/embed/weight: float32 [5, 3] there, float32 [5, 4] here",
        "  params/head/weight: float32 [4] here, missing there",
        "  params/norm/weight: float32 [3] there, unknown here",
    )


def test_another_optimizer_is_named(tmp_path):
    folder = _save(tmp_path / "checkpoints", 1)
    target = jax.eval_shape(_state)
    target["opt_state"]["muon"] = {"momentum": {"embed": jax.ShapeDtypeStruct((5, 3), jnp.float32)}}
    with (
        CheckpointStore(folder) as store,
        pytest.raises(UserError, match=r"(?s)its optimizer is not .*opt_state/muon/momentum/embed: .* missing there"),
    ):
        store.restore(1, target)


def _cut_files(folder):
    for file in folder.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip_bits(folder):
    for file in folder.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 0xFF
            file.write_bytes(bytes(data))


def _remove_metadata(folder):
    (folder / "model" / "_METADATA").unlink()


def _forget_tokens(folder):
    (folder / "metadata" / "metadata").write_text("{}")


# A read that fails leaves tensorstore calls under way, which complain about orbax's closed event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [_cut_files, _flip_bits, _remove_metadata, _forget_tokens])
def test_damage_is_reported_with_the_way_out(tmp_path, damage, caplog):
    folder = _save(tmp_path / "checkpoints", 1, 2)
    damage(folder / "2")
    with CheckpointStore(folder) as store:
        with pytest.raises(UserError, match=r"checkpoint .*/2: damaged: .+; remove that folder to go on from step 1$"):
            store.restore(2, jax.eval_shape(_state))
        store.restore(1, jax.eval_shape(_state))
    assert not caplog.records, "orbax says it again, in its own words"


def test_what_asyncio_says_of_other_failed_reads_is_dropped_and_nothing_else(tmp_path, caplog):
    with CheckpointStore(_save(tmp_path / "checkpoints", 1)):
        # As it does, or does not, when the garbage collector comes to a read that nobody waited for.
        unseen = "Task exception was never retrieved: ValueError('DATA_LOSS: ... [tensorstore_spec=...]')"
        logging.getLogger("asyncio").error(unseen)
        logging.getLogger("asyncio").error("another task failed")
    assert [record.message for record in caplog.records] == ["another task failed"]


def test_a_file_in_place_of_the_folder_is_found_at_the_start(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"checkpoints .*: cannot be written: .*File exists"):
        CheckpointStore(tmp_path / "checkpoints", keep=1)


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "part").write_text("unfinished")
    with CheckpointStore(tmp_path / "checkpoints", keep=2) as store:
        assert store.latest_step is None
    assert not left.exists()
