"""Runs the inline instructions of a kernel on a CPU: a value is a numpy array with one entry per lane of four warps."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np

LANES = np.arange(128, dtype=np.uint32)


def _halves(x):
    """[128] 32-bit registers as [128, 2] float32."""
    return np.ascontiguousarray(x, np.uint32).view(np.float16).reshape(-1, 2).astype(np.float32)


def _registers(x):
    """[128, 2] numbers as [128] registers of two float16."""
    return np.ascontiguousarray(x.astype(np.float16)).view(np.uint32)[:, 0]


def _bfloat16(x):
    """[128, 2] numbers as [128] registers of two bfloat16."""
    return np.ascontiguousarray(x.astype(ml_dtypes.bfloat16)).view(np.uint32)[:, 0]


def _signed(x):
    return x.astype(np.int32)


class Pair:
    """A vector of two float32 per lane."""

    def __init__(self, values):
        self.values = values


class Fragments:
    """The registers of an array [64, N] in the layout of the matrix unit."""

    def __init__(self, _registers, _layout=None, _is_signed=None):
        self.registers, self.layout = _registers, _layout

    @classmethod
    def of(cls, x):
        tiles = x.reshape(4, 2, 8, -1, 4, 2).transpose(3, 1, 0, 2, 4, 5).reshape(-1, 2, 128, 2)
        registers = np.empty(tiles.shape[:2], object)
        for i in np.ndindex(registers.shape):
            registers[i] = Pair(tiles[i])
        return cls(registers)

    @classmethod
    def of_words(cls, words):
        """Of registers with two float16 each."""
        pairs = [Pair(_halves(word)) for word in words]
        return cls(np.array(pairs, object).reshape(-1, 2))

    def words(self):
        return [_registers(x.values) for x in self.registers.flat]

    def array(self):
        tiles = np.stack([np.stack([x.values for x in pair]) for pair in self.registers])
        return tiles.reshape(-1, 2, 4, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(64, -1)


def scalar(value: int | float):
    """An argument that is the same for all lanes."""
    kind = np.float32 if isinstance(value, float) else np.uint32
    return SimpleNamespace(registers=SimpleNamespace(item=lambda: np.full(128, value, kind)))


class Machine:
    """Shared memory and the instructions that `warp_mosaic_gpu_vjp` uses; `names` replaces what that module imports."""

    def __init__(self):
        self.memory = np.zeros(1 << 16, np.uint8)
        integer = SimpleNamespace(get_signless=lambda bits: "i32")
        number = SimpleNamespace(get=lambda kind, value: value)
        ir = SimpleNamespace(
            IntegerType=integer, IntegerAttr=number, FloatAttr=number, F32Type=SimpleNamespace(get=lambda: "f32"),
            VectorType=SimpleNamespace(get=lambda *_: None), DenseI64ArrayAttr=SimpleNamespace(get=lambda at: at[0]),
        )  # fmt: skip
        vector = SimpleNamespace(extract=lambda x, dynamic_position, static_position: x.values[:, static_position])
        utils = SimpleNamespace(
            memref_ptr=lambda address: np.full(128, address, np.uint32),
            bitcast=lambda x, kind: _registers(x.values),
        )
        self.names = dict(
            ir=ir, vector=vector, arith=_ARITH, _asm=self.run, _store=self.store, _store_if=self.store_if,
            llvm=SimpleNamespace(ptrtoint=lambda kind, x: x, mlir_undef=lambda kind: None, insertelement=_insert),
            mosaic=SimpleNamespace(utils=utils, FragmentedArray=Fragments),
        )  # fmt: skip

    def write_tile(self, address: int, x: np.ndarray):
        """A tile [rows, 64] of float16, the 16-byte units of its rows permuted as the copy engine does."""
        for row, units in enumerate(x.astype(np.float16).view(np.uint8).reshape(len(x), 8, 16)):
            for unit, data in enumerate(units):
                at = address + 128 * row + 16 * (unit ^ row % 8)
                self.memory[at : at + 16] = data

    def run(self, text, constraints, operands, results, volatile=False):
        """One instruction for all lanes: a list of its results."""
        name = text.split()[0]
        match name.split(".")[0]:
            case "ldmatrix":
                return self._ldmatrix(operands[0], "trans" in name)
            case "ld":
                return [self._load_f32(operands[0], 4 * i) for i in range(int(results[1:]))]
            case "mma":
                count = constraints.index("f")
                return _mma(operands[: 2 * count // 3], operands[2 * count // 3 : count])
            case "mov":
                return [LANES]
            case "ex2":
                return [np.exp2(operands[0])]
            case "{" if "neg" in text:
                return [operands[0] * operands[1] - operands[2]]
            case "{" if "f16" in text:  # unpack
                return list(_halves(operands[0]).T)
            case "{":  # the same of bfloat16
                return [x.view(np.float32) for x in (operands[0] << 16, operands[0] & 0xFFFF0000)]
            case "cvt":
                return [(_bfloat16 if "bf16" in name else _registers)(np.stack(operands, -1))]
            case "movmatrix":
                matrices = np.ascontiguousarray(operands[0]).view(np.uint16).reshape(4, 8, 8).swapaxes(1, 2)
                return [np.ascontiguousarray(matrices).reshape(128, 2).view(np.uint32)[:, 0]]
            case "mul":
                return [_registers(_halves(operands[0]) * _halves(operands[1]))]
            case "shfl" if "idx" in name:
                return [operands[0]]  # of one value for all lanes
            case "shfl":
                return [operands[0][LANES ^ int(text.split(",")[2])]]
            case "fma":
                return [operands[0] * operands[1] + operands[2]]
        assert name in ("@$4", "@!$4"), text
        a, b, c, condition = operands
        return [np.where(condition == (name == "@$4"), a * b + c, c)]

    def store(self, address, value, kind="f"):
        value = value.astype(np.float32 if kind == "f" else np.uint32)
        for at, x in zip(address, value, strict=True):
            self.memory[at : at + 4] = x.reshape(1).view(np.uint8)

    def store_if(self, condition, address, value):
        self.store(address[condition], value[condition])

    def read_tile(self, address: int, dtype) -> np.ndarray:
        """Undoes `write_tile`, [64, 64] of two bytes each."""
        unit = np.arange(8) ^ np.arange(64)[:, None] % 8
        units = self.memory[address : address + 8192].reshape(64, 8, 16)
        return np.take_along_axis(units, unit[..., None], 1).reshape(64, 128).view(dtype)

    def write_f32(self, address: int, x: np.ndarray):
        self.memory[address : address + x.nbytes] = x.view(np.uint8)

    def read_f32(self, address: int, count: int) -> np.ndarray:
        return self.memory[address : address + 4 * count].view(np.float32)

    def _load_f32(self, address, offset):
        return np.stack([self.memory[at : at + 4] for at in address + offset]).view(np.float32)[:, 0]

    def _ldmatrix(self, address, transposed):
        rows = np.stack([self.memory[at : at + 16] for at in address]).view(np.uint16)
        matrices = rows.reshape(4, 4, 8, 8)  # warp, matrix
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        return [np.ascontiguousarray(matrices[:, m]).reshape(128, 2).view(np.uint32)[:, 0] for m in range(4)]


def _mma(a, b):
    """Fragments of [16, k] and [k, 8] per warp, two registers and one per 8 of k, to four of [16, 8]."""
    block = lambda x: _halves(x).reshape(4, 8, 8)
    left = [np.concatenate([block(x) for x in a[i : i + 2]], 1) for i in range(0, len(a), 2)]
    out = sum(x @ block(y).swapaxes(1, 2) for x, y in zip(left, b, strict=True))
    return [x for half in np.split(out, 2, axis=1) for x in half.reshape(128, 2).T]


def _insert(vector, x, position):
    return Pair(np.stack([x, x] if vector is None else [vector.values[:, 0], x], -1))


def _constant(kind, value):
    return np.full(128, value if kind == "f32" else value & 0xFFFFFFFF, np.float32 if kind == "f32" else np.uint32)


_ARITH = SimpleNamespace(
    constant=_constant, select=np.where, addi=np.add, addf=np.add, subi=np.subtract, subf=np.subtract, mulf=np.multiply,
    muli=np.multiply, divui=np.floor_divide,
    andi=np.bitwise_and, ori=np.bitwise_or, xori=np.bitwise_xor, shli=np.left_shift, shrui=np.right_shift,
    cmpi=lambda compare, a, b: compare(_signed(a), _signed(b)),
    CmpIPredicate=SimpleNamespace(slt=np.less, ne=np.not_equal, eq=np.equal),
)  # fmt: skip
