"""Reads a compiled program: what its collectives send, how often, and over which axes of the mesh."""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BITS = {"pred": 8, "f64": 64, "s64": 64, "u64": 64, "f32": 32, "s32": 32, "u32": 32, "f16": 16, "bf16": 16}
BITS |= {"s16": 16, "u16": 16, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Collective:
    """One kind of exchange over the same axes.

    Args:
      kind: one of `KINDS`.
      axes: of the mesh, over which the devices of a group differ.
      count: how often per step.
      sent_bytes: by each device per step, in the best algorithm: (n - 1) / n of the whole for n devices, twice for an
        all-reduce.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    sent_bytes: int


def read_collectives(program: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Counts the collectives of an optimised HLO program, those in loops as often as these run.

    Args:
      program: `compiled.as_text()`; devices are numbered through the mesh in the order of its axes.
      mesh_shape: sizes of the axes, in order.
    """
    blocks = _split_computations(program)
    entry = next(name for name, (first, _) in blocks.items() if first)
    sums: dict[tuple[str, tuple[str, ...]], list[int]] = collections.defaultdict(lambda: [0, 0])
    for name, times in _count_runs(blocks, entry).items():
        for line in blocks[name][1]:
            for kind, axes, sent in _read_line(line, mesh_shape):
                sums[kind, axes][0] += times
                sums[kind, axes][1] += times * sent
    return [Collective(*key, *value) for key, value in sorted(sums.items())]


def _split_computations(program: str) -> dict[str, tuple[bool, list[str]]]:
    """Name -> (is it the entry, its lines)."""
    blocks: dict[str, tuple[bool, list[str]]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        if found := COMPUTATION.match(line):
            lines = []
            blocks[found[2]] = (bool(found[1]), lines)
        elif line.startswith("  "):
            lines.append(line)
    return blocks


def _count_runs(blocks: Mapping[str, tuple[bool, list[str]]], entry: str) -> dict[str, int]:
    """How often each computation runs; the branches of a conditional all count."""
    runs: dict[str, int] = collections.defaultdict(int)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in blocks[name][1]:
            trips = int(found[1]) if " while(" in line and (found := TRIPS.search(line)) else 1
            called = CALLED.findall(line)
            if found := BRANCHES.search(line):
                called += [branch.strip().lstrip("%") for branch in found[1].split(",")]
            for other in called:
                if other in blocks:
                    visit(other, times * trips)

    visit(entry, 1)
    return runs


def _read_line(line: str, mesh_shape: Mapping[str, int]) -> Iterator[tuple[str, tuple[str, ...], int]]:
    found = INSTRUCTION.match(line)
    if not found:
        return
    kind, start = found[3].removesuffix("-start"), found[3].endswith("-start")
    if kind not in KINDS:
        return
    group = _first_group(line, mesh_shape)
    axes = _varying_axes(group, mesh_shape)
    shapes = [_shape_bytes(*shape) for shape in SHAPE.findall(found[2])]
    if start and kind == "collective-permute":
        shapes = shapes[:1]
    elif start and (kind != "all-reduce" or found[2].startswith("((")):
        shapes = shapes[len(shapes) // 2 :]  # behind the operands
    n, size = len(group), sum(shapes)
    if n > 1:
        yield kind, axes, _sent(kind, n, size)


def _sent(kind: str, n: int, size: int) -> int:
    """`size`: bytes of the result."""
    match kind:
        case "all-reduce":
            return 2 * size * (n - 1) // n
        case "reduce-scatter":
            return size * (n - 1)
        case "collective-permute":
            return size
    return size * (n - 1) // n


def _shape_bytes(dtype: str, dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d) * BITS.get(dtype, 0) // 8


def _first_group(line: str, mesh_shape: Mapping[str, int]) -> Sequence[int]:
    """Devices of one group, numbered through the mesh; those of a permutation are a sender and its receiver."""
    devices = math.prod(mesh_shape.values())
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return [int(found[1]), int(found[2])]
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(d) for d in found[1].split(",")]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        numbers = np.arange(devices).reshape([int(d) for d in found[3].split(",")])
        if found[4]:
            numbers = numbers.transpose([int(d) for d in found[4].split(",")])
        return numbers.reshape(int(found[1]), int(found[2]))[0].tolist()
    if found := re.search(r"replica_groups=@?mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        chosen = re.findall(r"'([^']+)'", found[2])
        numbers = np.arange(devices).reshape(list(sizes.values()))
        index = tuple(slice(None) if name in chosen else 0 for name in sizes)
        return numbers[index].ravel().tolist()
    return range(devices)  # no groups: everyone


def _varying_axes(group: Sequence[int], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(np.asarray(group), tuple(mesh_shape.values())))
    varies = np.any(places != places[:, :1], axis=1)
    return tuple(name for name, differs in zip(mesh_shape, varies, strict=True) if differs)
