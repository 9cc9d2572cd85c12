"""Which device stands where: one mesh for a run, checked against the devices, the model and the batch."""

import math
from collections.abc import Iterator, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from kimi_jax.config import mesh as config
from kimi_jax.config.evaluation import LossEvaluation
from kimi_jax.config.mixer import MlaMixer
from kimi_jax.config.model import ModelConfig, MoeFfn
from kimi_jax.config.train import RunConfig
from kimi_jax.errors import UserError
from pallas_kernels.partition import BATCH_AXES

AXES = ("data", "fsdp", "expert", "context", "tensor")
CHUNK = 64  # tokens that the recurrent operators take at a time


def mesh_shape(cfg: config.Mesh, num_devices: int) -> tuple[int, ...]:
    """Sizes of `AXES`.

    Raises:
      UserError: they do not multiply to the number of devices.
    """
    rest = cfg.fsdp * cfg.expert * cfg.context * cfg.tensor
    data = cfg.data or max(num_devices // rest, 1)
    shape = (data, cfg.fsdp, cfg.expert, cfg.context, cfg.tensor)
    if math.prod(shape) != num_devices:
        sizes = ", ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True) if size > 1) or "data=1"
        raise UserError(f"mesh: {sizes} need {math.prod(shape)} devices, but there are {num_devices}")
    return shape


def build_mesh(cfg: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays the devices out so that neighbours on the last axes are near each other.

    Args:
      cfg: sizes of the axes.
      devices: those to use; None: all that jax sees.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(cfg, len(devices))
    return Mesh(mesh_utils.create_device_mesh(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(cfg: config.Mesh, num_devices: int) -> AbstractMesh:
    """The same mesh without devices, for plans and ahead-of-time compilation."""
    return AbstractMesh(mesh_shape(cfg, num_devices), AXES, (AxisType.Auto,) * len(AXES))


def check_run(mesh: Mesh | AbstractMesh, cfg: RunConfig) -> None:
    """Checks that model, batch and sequence divide over the mesh, before anything is compiled.

    Raises:
      UserError: they do not, with one line for each reason.
    """
    problems = [*_batch_problems(mesh, cfg), *_evaluation_problems(mesh, cfg), *_model_problems(mesh, cfg.model)]
    if problems:
        raise UserError(problems)


def _batch_problems(mesh: Mesh | AbstractMesh, cfg: RunConfig) -> Iterator[str]:
    batch_size, grad_accum = cfg.train.batch_size, cfg.train.grad_accum
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows = batch_size // grad_accum
    if rows % parts:
        sizes = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES)
        yield (
            f"train.batch_size={batch_size}: {rows} rows of a microbatch (grad_accum={grad_accum}) do not divide over "
            f"{parts} parts of the mesh ({sizes})"
        )
    context, seq_len = mesh.shape["context"], cfg.data.seq_len
    if context > 1 and seq_len % (context * CHUNK):
        yield (
            f"data.seq_len={seq_len}: not a multiple of mesh.context={context} x {CHUNK} tokens of a chunk: "
            f"{context * CHUNK}"
        )


def _evaluation_problems(mesh: Mesh | AbstractMesh, cfg: RunConfig) -> Iterator[str]:
    parts, chunks = math.prod(mesh.shape[axis] for axis in BATCH_AXES), mesh.shape["context"] * CHUNK
    for name, evaluation in cfg.train.evaluations_of(LossEvaluation).items():
        rows = evaluation.batch_size or cfg.train.batch_size
        seq_len = evaluation.seq_len or (evaluation.data or cfg.data).seq_len
        if rows % parts:
            yield f"train.evaluations.{name}.batch_size={rows}: does not divide over {parts} parts of the mesh"
        if mesh.shape["context"] > 1 and seq_len % chunks:
            yield f"train.evaluations.{name}.seq_len={seq_len}: not a multiple of {chunks}, as data.seq_len must be"


def _model_problems(mesh: Mesh | AbstractMesh, model: ModelConfig) -> Iterator[str]:
    expert, tensor = mesh.shape["expert"], mesh.shape["tensor"]
    if expert > 1 and not isinstance(model.ffn, MoeFfn):
        yield f"mesh.expert={expert}: the model has no experts (model.ffn.kind={model.ffn.kind})"
    elif expert > 1 and model.ffn.num_experts % expert:
        yield f"model.ffn.num_experts={model.ffn.num_experts}: not a multiple of mesh.expert={expert}"
    context = mesh.shape["context"]
    for name in sorted(set(model.mixer_names)):
        mixer = model.mixers[name]
        if isinstance(mixer, MlaMixer) and mixer.num_heads % (tensor * context):
            product = f"mesh.tensor={tensor} x mesh.context={context}: {tensor * context}"
            yield f"model.mixers.{name}.num_heads={mixer.num_heads}: not a multiple of {product}"
            continue
        heads = {"num_heads": mixer.num_heads}
        if not isinstance(mixer, MlaMixer) and mixer.num_value_heads:
            heads["num_value_heads"] = mixer.num_value_heads
        for field, number in heads.items():
            if number % tensor:
                yield f"model.mixers.{name}.{field}={number}: not a multiple of mesh.tensor={tensor}"
