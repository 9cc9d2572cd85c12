"""Backward of KDA on Hopper: what a warp does in registers: levels inside 16 tokens, sums over rows, fast functions."""

import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

W = plgpu.Layout.WGMMA
C = 64  # tokens of a chunk, columns of a tile
PART = 16  # columns that `fine_levels` takes at a time
ONE = 0x3C00
_SQUARE = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _i32():
    return ir.IntegerType.get_signless(32)


def _c(x):
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), x if x < 2**31 else x - 2**32))


def _asm(text, constraints, operands, results, volatile=False):
    kind = ir.F32Type.get() if results[0] == "f" else _i32()
    n = int(results[1:])
    out_type = kind if n == 1 else llvm.StructType.get_literal([kind] * n)
    constraints = ",".join(["=" + results[0]] * n + list(constraints) + (["~{memory}"] if volatile else []))
    out = llvm.inline_asm(out_type, operands, text, constraints, has_side_effects=volatile)
    return [out] if n == 1 else [llvm.extractvalue(kind, out, [i]) for i in range(n)]


def _store(address, value, kind="f"):
    llvm.inline_asm(None, [address, value], "st.shared.b32 [$0], $1;", f"r,{kind},~{{memory}}", has_side_effects=True)


def _store_if(condition, address, value):
    operands, kinds = [address, value, condition], "r,f,b,~{memory}"
    llvm.inline_asm(None, operands, "@$2 st.shared.b32 [$0], $1;", kinds, has_side_effects=True)


def _slots(first, n):
    return "{" + ", ".join(f"${i}" for i in range(first, first + n)) + "}"


def mma(a, b):
    """A (16 x 8 per two registers) times B (8 x 8 per register): 16 x 8 in float32, from zero."""
    k = 8 * len(b)
    f = ir.F32Type.get()
    zero = arith.constant(f, ir.FloatAttr.get(f, 0.0))
    na, nb = len(a), len(b)
    text = (
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.f16.f16.f32 "
        f"{_slots(0, 4)}, {_slots(4, na)}, {_slots(4 + na, nb)}, {_slots(4 + na + nb, 4)};"
    )
    return _asm(text, ["r"] * (na + nb) + ["f"] * 4, [*a, *b, *[zero] * 4], "f4")


def ldmatrix(address, transposed):
    t = ".trans" if transposed else ""
    return _asm(f"ldmatrix.sync.aligned.m8n8.x4{t}.shared.b16 {_slots(0, 4)}, [$4];", ["r"], [address], "r4", True)


def exp2(x):
    return _asm("ex2.approx.ftz.f32 $0, $1;", ["f"], [x], "f1")[0]


def pack(low, high):
    return _asm("cvt.rn.f16x2.f32 $0, $2, $1;", ["f", "f"], [low, high], "r1")[0]


def unpack(x):
    return _asm("{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }", ["r"], [x], "f2")


def split(a, b):
    """Two numbers as two registers of two bfloat16 each, which add up to them."""
    rounded = lambda a, b: _asm("cvt.rn.bf16x2.f32 $0, $2, $1;", ["f", "f"], [a, b], "r1")[0]
    high = rounded(a, b)
    wide = _asm("{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", ["r"], [high], "f2")
    return high, rounded(arith.subf(a, wide[0]), arith.subf(b, wide[1]))


def transpose(x):
    """Of an 8 x 8 matrix, two numbers per lane."""
    return _asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", ["r"], [x], "r1")[0]


def mul16(a, b):
    return _asm("mul.f16x2 $0, $1, $2;", ["r", "r"], [a, b], "r1")[0]


def fma(a, b, c):
    return _asm("fma.rn.f32 $0, $1, $2, $3;", ["f", "f", "f"], [a, b, c], "f1")[0]


def fms(a, b, c):
    return _asm("{ .reg .f32 n; neg.f32 n, $3; fma.rn.f32 $0, $1, $2, n; }", ["f", "f", "f"], [a, b, c], "f1")[0]


def fma_if(condition, a, b, c, wanted=True):
    """a b + c in the lanes where the condition is as wanted, else c."""
    guard = "@$4" if wanted else "@!$4"
    return _asm(f"{guard} fma.rn.f32 $0, $1, $2, $0;", ["f", "f", "0", "b"], [a, b, c, condition], "f1")[0]


def _scalars(array):
    return [
        vector.extract(r, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([p]))
        for r in array.registers.flatten()
        for p in range(2)
    ]


def _rebuild(array, v):
    two = ir.VectorType.get((2,), ir.F32Type.get())
    undef = llvm.mlir_undef(two)
    regs = []
    for a, b in zip(v[::2], v[1::2], strict=True):
        x = llvm.insertelement(undef, a, position=_c(0))
        regs.append(llvm.insertelement(x, b, position=_c(1)))
    return _like(array, np.asarray(regs, dtype=object).reshape(array.registers.shape))


def _position():
    """(lane, warp of the warpgroup, row of the lane in an 8 x 8 fragment, its first column), made anew."""
    thread = _asm("mov.u32 $0, %tid.x;", [], [], "r1", True)[0]
    lane, warp = arith.andi(thread, _c(31)), arith.andi(arith.shrui(thread, _c(5)), _c(3))
    return lane, warp, arith.shrui(lane, _c(2)), arith.shli(arith.andi(lane, _c(3)), _c(1))


def _base(ref):
    return llvm.ptrtoint(_i32(), mosaic.utils.memref_ptr(ref))


def _less(a, b):
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def _equal(a, b):
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def _array(words, dtype):
    """[64, 64] of 16-bit numbers from two in a word, by (8 columns, upper or lower 8 of the warp's rows)."""
    kind = ir.VectorType.get((2,), {"float16": ir.F16Type, "bfloat16": ir.BF16Type}[jnp.dtype(dtype).name].get())
    shape = W.to_mgpu().registers_shape((64, 64))
    registers = np.asarray([mosaic.utils.bitcast(x, kind) for x in words], dtype=object).reshape(shape)
    return mosaic.FragmentedArray(_registers=registers, _layout=W.to_mgpu(), _is_signed=None)


def _words(array):
    return [mosaic.utils.bitcast(x, _i32()) for x in array.registers.flat]


def _lines(lane):
    """Of the row that a lane addresses in an x4 load: (its number in a matrix, bits of the matrix's number)."""
    matrix = arith.shrui(lane, _c(3))  # matrix m comes from the addresses in lanes 8m .. 8m + 7
    return arith.andi(lane, _c(7)), arith.andi(matrix, _c(1)), arith.shrui(matrix, _c(1))


def _address(start, token, unit):
    """In a tile with rows of 128 bytes, their 16-byte units permuted by the row's number."""
    unit = arith.shli(arith.xori(unit, arith.andi(token, _c(7))), _c(4))
    return arith.addi(start, arith.addi(arith.shli(token, _c(7)), unit))


def _tables(da_ref, dl_ref, beta_ref):
    """What all columns have in common in `_fine`, as words: spans of levels 1, 2, 4 and the two of 8, beta of the first
    and the second 8 tokens, left operands by level and block, and at the level of 8."""
    add, and_, choose, zero = arith.addi, arith.andi, arith.select, _c(0)
    lane, warp, row, col = _position()
    line, first_bit, second_bit = _lines(lane)
    first_token = arith.shli(warp, _c(4))

    def diagonal(ref):  # the warp's 16 x 16 block, each register two columns of a row
        token = add(first_token, add(arith.shli(first_bit, _c(3)), line))
        return ldmatrix(_address(_base(ref), token, add(arith.shli(warp, _c(1)), second_bit)), False)

    def pair_of(predicate, ones=ONE):  # two halves: predicate at columns col, col + 1
        low, high = (choose(predicate(add(col, _c(x))), _c(ones << 16 * x), zero) for x in range(2))
        return arith.ori(low, high)

    def span(b):
        """0/1: the decays of a row up to the end of the first block of its pair, or since; blocks of b <= 8 tokens."""
        start = and_(row, _c(-b & 0xFFFFFFFF))
        since = lambda t: and_(_less(t, add(row, _c(1))), _less(add(start, _c(-1 & 0xFFFFFFFF)), t))
        until = lambda t: and_(_less(row, t), _less(t, add(start, _c(b))))
        if b == 8:
            return pair_of(until), pair_of(since)
        return [pair_of(lambda t: choose(_in_second(row, b), since(t), until(t)))]

    def operands(n):
        """Rows of second blocks read the keys of first ones, those the keys and queries of second ones."""
        mask = pair_of(lambda t: _equal(arith.shrui(arith.xori(row, t), _c(n)), _c(1)), 0xFFFF)
        for block in range(2):
            a, l, second = and_(da[3 * block], mask), and_(dl[3 * block], mask), _in_second(row, 1 << n)
            yield from (choose(second, a, l), choose(second, l, zero), choose(second, zero, a))

    da, dl = diagonal(da_ref), diagonal(dl_ref)
    row_at = add(_base(beta_ref), arith.shli(add(first_token, row), _c(2)))
    betas = [_asm("ld.shared.f32 $0, [$1];", ["r"], [add(row_at, _c(x))], "f1", True)[0] for x in (0, 32)]
    spans = [x for b in (1, 2, 4, 8) for x in span(b)]
    small = [x for n in range(3) for x in operands(n)]
    words = [*spans, *(pack(x, x) for x in betas), *small, da[1], dl[1], dl[2], da[2]]
    return words + [zero] * (32 - len(words))


def _in_second(row, b):
    return arith.cmpi(arith.CmpIPredicate.ne, arith.andi(row, _c(b)), _c(0))


def fine_tables(da, dl, beta):
    """For `fine_levels`: two arrays [64, 64], whose registers are all that is meant.

    Args:
      da, dl: float16 tiles [64, 64]: gradients of Aqk and of L / beta, each with its transpose above the diagonal.
      beta: float32 [64] in shared memory.
    """
    array = plgpu.ShapeDtypeStruct((C, C), jnp.float16, W)

    @plgpu.inline_mgpu(arg_types=(_SQUARE,) * 2 + (plgpu.RefType(),), return_type=(array,) * 2)
    def run(_, *refs):
        words = _tables(*refs)
        return tuple(_array(part, jnp.float16) for part in (words[:16], words[16:]))

    return tuple(plgpu.layout_cast(x, W) for x in run(da, dl, beta))


def _fine(ctx, g_ref, k_ref, q_ref, high_ref, low_ref, first_table, second_table, part, dq, up, down):
    add, shl, choose, zero = arith.addi, arith.shli, arith.select, _c(0)
    negative = lambda x: arith.xori(x, _c(0x80008000))
    lane, warp, row, col = _position()
    line, first_bit, second_bit = _lines(lane)
    first_unit, first_token = shl(part.registers.item(), _c(1)), shl(warp, _c(4))  # units of 8 channels each
    words = iter(_words(first_table) + _words(second_table))
    take = lambda n: [next(words) for _ in range(n)]
    spans, betas, operands = take(5), take(2), [[take(3), take(3)] for _ in range(3)]
    da, dl, dl_read, da_read = take(4)
    dq_v, up_v, down_v = (_scalars(x) for x in (dq, up, down))
    dg_v = [None] * len(dq_v)

    # Decays by channel, keys and queries by token: [2 * block + tile], 8 tokens by 8 channels. A register has two
    # tokens of a channel, or two channels of a token.
    at = add(first_token, add(shl(second_bit, _c(3)), line)), add(first_unit, first_bit)
    g, k, q = (ldmatrix(_address(_base(ref), *at), ref is g_ref) for ref in (g_ref, k_ref, q_ref))

    def start_decay(i, key, query, beta):
        """What the sums so far say about the running sums of the decays."""
        keys, queries, (beta, _) = unpack(key), unpack(query), unpack(beta)
        for x in range(2):
            of_keys = fms(beta, up_v[i + x], down_v[i + x])
            dg_v[i + x] = fma(keys[x], of_keys, arith.mulf(queries[x], dq_v[i + x]))

    def add_small(n, i, block, key, query, exponents):
        """The level of blocks of 2^n tokens, 1, 2 or 4."""
        second = _in_second(row, 1 << n)
        own = [exp2(x) for x in exponents]
        factor = pack(*own)
        key, query = mul16(key, factor), mul16(query, factor)
        read = mul16(key, betas[block])
        # beta belongs to the keys that are read back: those of the second blocks
        out = mma([*operands[n][block], zero], [transpose(choose(second, read, key)), transpose(query)])
        plus, read = unpack(choose(second, query, negative(key))), unpack(read)
        for x in range(2):
            dg_v[i + x] = fma(read[x], out[2 + x], fma(plus[x], out[x], dg_v[i + x]))
            dq_v[i + x] = fma_if(second, own[x], out[x], dq_v[i + x])
            down_v[i + x] = fma_if(second, own[x], out[x], down_v[i + x], False)
            up_v[i + x] = fma(own[x], out[2 + x], up_v[i + x])

    outer = {}
    for block, tile in np.ndindex(2, 2):
        i, m = 4 * tile + 2 * block, 2 * block + tile  # where a fragment begins in the sums, its number
        start_decay(i, k[m], q[m], betas[block])
        exponents = mma(spans[:2], [g[m]]) + mma([spans[2], spans[3 + block]], [g[m]])
        for n in range(3):
            add_small(n, i, block, k[m], q[m], exponents[2 * n : 2 * n + 2])
        outer[block, tile] = [exp2(x) for x in exponents[6:]]
    for tile in range(2):  # the second 8 tokens read the first 8
        early, late = outer[0, tile], outer[1, tile]
        written_keys, read_keys, queries = (
            mul16(x, pack(*factor)) for x, factor in ((k[tile], early), (k[2 + tile], late), (q[2 + tile], late))
        )
        read_keys = mul16(read_keys, betas[1])
        reads = mma([da, dl], [transpose(written_keys)])
        written = mma([dl_read, zero, da_read, zero], [transpose(read_keys), transpose(queries)])
        minus, plus, read = map(unpack, (negative(written_keys), queries, read_keys))
        for x in range(2):
            i = 4 * tile + x
            dg_v[i] = fma(minus[x], written[x], dg_v[i])
            down_v[i] = fma(early[x], written[x], down_v[i])
            i = 4 * tile + 2 + x
            dg_v[i] = fma(read[x], reads[2 + x], fma(plus[x], reads[x], dg_v[i]))
            dq_v[i] = fma(late[x], reads[x], dq_v[i])
            up_v[i] = fma(late[x], reads[2 + x], up_v[i])
    for block, tile in np.ndindex(2, 2):
        i, token = 4 * tile + 2 * block, add(first_token, add(row, _c(8 * block)))
        for ref, value in zip((high_ref, low_ref), split(*dg_v[i : i + 2]), strict=True):
            _store(add(_address(_base(ref), token, add(first_unit, _c(tile))), shl(col, _c(1))), value, "r")
    return _rebuild(dq, dq_v), _rebuild(up, up_v), _rebuild(down, down_v)


def fine_levels(g, k, q, high, low, tables, part, dq, up, down):
    """Adds the pairs of tokens inside 16-token blocks, levels 1 to 8, to the sums over 16 of a tile's 64 columns.

    Args:
      g, k, q: float16 tiles [64, 64] in shared memory: log2-decays, keys, queries.
      high, low: bfloat16 tiles [64, 64] that get the gradient of G, as a sum of two. What the other levels say of it
        follows from the three sums; what a pair in here adds to its two tokens is built from the very operands,
        rounded, that the pair's other side is: so it cancels in the sums over later tokens.
      tables: of `fine_tables`.
      part: 0 to 3, the columns.
      dq, up, down: float32 [64, 16]: gradients of the queries, of the keys where +G and -G stand beside them.
    """
    out = plgpu.ShapeDtypeStruct((C, PART), jnp.float32, W)
    run = plgpu.inline_mgpu(arg_types=(_SQUARE,) * 5 + (W,) * 6, return_type=(out,) * 3)(_fine)
    return run(g, k, q, high, low, *tables, part, dq, up, down)


def _column_sums(ctx, x, out, *, add=False):
    lane, warp, _, col = _position()
    registers = x.registers.reshape(-1, 2)
    get = lambda r, p: vector.extract(r, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([p]))
    values = [arith.addf(get(a, p), get(b, p)) for a, b in registers for p in range(2)]
    tile = _c(0)  # of 8 columns, to which the values that the lane keeps belong
    for bit in (16, 8, 4):  # every step halves the columns a lane keeps
        upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, _c(bit)), _c(0))
        half = len(values) // 2
        kept = []
        for a, b in zip(values[:half], values[half:], strict=True):
            mine, other = arith.select(upper, b, a), arith.select(upper, a, b)
            got = _asm(f"shfl.sync.bfly.b32 $0, $1, {bit}, 0x1f, 0xffffffff;", ["f"], [other], "f1", True)[0]
            kept.append(arith.addf(mine, got))
        values = kept
        tile = arith.addi(arith.shli(tile, _c(1)), arith.select(upper, _c(1), _c(0)))
    column = arith.addi(arith.shli(tile, _c(3)), col)  # and the next
    address = arith.addi(_base(out), arith.addi(arith.shli(warp, _c(8)), arith.shli(column, _c(2))))
    for i, value in enumerate(values):
        at = arith.addi(address, _c(4 * i))
        if add:
            value = arith.addf(value, _asm("ld.shared.f32 $0, [$1];", ["r"], [at], "f1", True)[0])
        _store(at, value)


def column_sums(x, out):
    """Sums x [64, 64] over the 16 rows of every warp, into out [4 * 64] in shared memory, float32."""
    plgpu.inline_mgpu(arg_types=(W, plgpu.RefType()))(_column_sums)(x, out)


def add_column_sums(x, out):
    """`column_sums`, added to what is there."""
    plgpu.inline_mgpu(arg_types=(W, plgpu.RefType()))(functools.partial(_column_sums, add=True))(x, out)


def _triangle(ones, lower, inclusive, full):
    """Words of a 0/1 matrix: in the block of 16 on the diagonal a triangle, elsewhere whole blocks.

    Args:
      ones: two 1 in a word.
      lower: bool, or a condition of the warp: the triangle below the diagonal, or above.
      inclusive: whether the diagonal belongs to what is below.
      full: of (the warp's block, the block of 16 columns): whether it is all ones.
    """
    _, warp, row, col = _position()
    # Not a constant to the compiler: a constant register operand of wgmma was seen to lose terms.
    ones = _asm("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", ["r"], [_c(ones)], "r1", True)[0]
    zero, last = arith.andi(ones, _c(0x00010001)), arith.addi(row, _c(int(inclusive)))
    pick = lambda a, b: (a if lower else b) if isinstance(lower, bool) else arith.select(lower(warp), a, b)
    low, high = (arith.select(_less(arith.addi(col, _c(x)), last), _c(0xFFFF << 16 * x), zero) for x in range(2))
    below = arith.andi(arith.ori(low, high), ones)
    corner, left, right = pick(below, arith.xori(below, ones)), pick(ones, zero), pick(zero, ones)
    words = []
    for block in map(_c, range(C // 16)):
        rest = arith.select(full(warp, block), ones, zero)
        words += [arith.select(_equal(warp, block), x, rest) for x in (corner, left, right, corner)]
    return words


def triangle(*, lower, inclusive, dtype=jnp.float16):
    """0/1 [64, 64]: ones below the diagonal (`lower`) or above; `inclusive`: the diagonal belongs to what is below."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((C, C), dtype, W))
    def run(_):
        one = {"float16": ONE, "bfloat16": 0x3F80}[jnp.dtype(dtype).name]
        full = _less if not lower else lambda warp, block: _less(block, warp)
        return _array(_triangle(one << 16 | one, lower, inclusive, full), dtype)

    return plgpu.layout_cast(run(), W)  # said twice, or the search for layouts goes on for minutes


def _same_document(address):
    """Words of ones where the codes of row and column, [64] float32 in shared memory, are equal; see `_triangle`."""
    _, warp, row, col = _position()
    at = lambda token: arith.addi(address, arith.shli(token, _c(2)))
    first = arith.addi(arith.shli(warp, _c(4)), row)
    load = lambda text, token, n: _asm(f"ld.shared.{text};", ["r"], [at(token)], f"r{n}", True)
    of_rows = [load("b32 $0, [$1]", arith.addi(first, _c(x)), 1)[0] for x in (0, 8)]
    words = []
    for tile in range(C // 8):
        of_columns = load("v2.b32 {$0, $1}, [$2]", arith.addi(col, _c(8 * tile)), 2)
        for own in of_rows:
            halves = [arith.select(_equal(own, x), _c(0xFFFF << 16 * i), _c(0)) for i, x in enumerate(of_columns)]
            words.append(arith.ori(*halves))
    return words


def later_in_document(codes):
    """0/1 [64, 64] bfloat16: ones on and above the diagonal where row and column have one code; [64] float32, in
    shared memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((C, C), jnp.bfloat16, W))
    def run(_, codes):
        words = zip(_triangle(0x3F803F80, False, False, _less), _same_document(_base(codes)), strict=True)
        return _array([arith.andi(*pair) for pair in words], jnp.bfloat16)

    return plgpu.layout_cast(run(codes), W)


def _fold(lower, upper, factor):
    """Words of float16: factor times the numbers below the diagonal of one array, those on and above it of another."""
    _, warp, row, col = _position()
    lower, upper, factor, words = _scalars(lower), _scalars(upper), factor.registers.item(), []
    inside = [_less(arith.addi(col, _c(x)), row) for x in range(2)]
    for tile, rows in np.ndindex(C // 8, 2):
        block, right = _c(tile // 2), tile % 2
        below, here = _less(block, warp), _equal(block, warp)
        pair = []
        for x in range(2):
            if right == rows:
                wanted = arith.ori(below, arith.andi(here, inside[x]))
            else:
                wanted = below if right else arith.ori(below, here)
            i = 2 * (2 * tile + rows) + x
            pair.append(arith.mulf(arith.select(wanted, lower[i], upper[i]), factor))
        words.append(pack(*pair))
    return words


def fold(lower, upper, factor):
    """factor times the part below the diagonal of one array [64, 64], the rest of another, float16."""

    @plgpu.inline_mgpu(arg_types=(W,) * 3, return_type=plgpu.ShapeDtypeStruct((C, C), jnp.float16, W))
    def run(_, lower, upper, factor):
        return _array(_fold(lower, upper, factor), jnp.float16)

    return plgpu.layout_cast(run(lower, upper, factor), W)


def _store_diagonal(ctx, x, factor, out):
    _, warp, row, col = _position()
    values, factor, first = _scalars(x), factor.registers.item(), _equal(col, row)
    mine = arith.ori(first, _equal(arith.addi(col, _c(1)), row))
    token = arith.addi(arith.shli(warp, _c(4)), row)
    for rows in range(2):
        found = None
        for block in range(C // 16):
            i = 2 * (2 * (2 * block + rows) + rows)
            value = arith.select(first, values[i], values[i + 1])
            found = value if found is None else arith.select(_equal(warp, _c(block)), value, found)
        address = arith.addi(_base(out), arith.shli(arith.addi(token, _c(8 * rows)), _c(2)))
        _store_if(mine, address, arith.mulf(found, factor))


def store_diagonal(x, factor, out):
    """factor times the diagonal of x [64, 64], into out [64] in shared memory, float32."""
    plgpu.inline_mgpu(arg_types=(W, W, plgpu.RefType()))(_store_diagonal)(x, factor, out)


def _second(level, warp):
    """Whether the warp's tokens are the second of a pair of blocks; levels of 16 tokens (4) and of 32 (5)."""
    bit = arith.andi(arith.shrui(warp, arith.subi(level, _c(4))), _c(1))
    return arith.cmpi(arith.CmpIPredicate.ne, bit, _c(0))


def _level_triangle(level):
    level = level.registers.item()
    number = lambda x: arith.shrui(x, arith.subi(level, _c(4)))

    def full(warp, block):
        beside = arith.select(_second(level, warp), _less(block, warp), _less(warp, block))
        return arith.andi(_equal(number(warp), number(block)), beside)

    return _triangle(ONE << 16 | ONE, functools.partial(_second, level), True, full)


def level_triangle(level):
    """0/1 [64, 64]: the decays that a row sums at level 4 or 5: those since the start of its block of 16 or 32 tokens
    if it is the second of a pair, those after the row up to the block's end if it is the first."""

    @plgpu.inline_mgpu(arg_types=(W,), return_type=plgpu.ShapeDtypeStruct((C, C), jnp.float16, W))
    def run(_, level):
        return _array(_level_triangle(level), jnp.float16)

    return plgpu.layout_cast(run(level), W)


def _level_pairs(words, level):
    level, (_, warp, _, _), zero = level.registers.item(), _position(), _c(0)
    number = lambda x: arith.shrui(x, arith.subi(level, _c(4)))
    paired = [_equal(number(arith.xori(warp, _c(block))), _c(1)) for block in range(C // 16)]
    words = [arith.select(paired[i // 4], x, zero) for i, x in enumerate(words)]
    second = _second(level, warp)
    return words, [arith.select(second, zero, x) for x in words], [arith.select(second, x, zero) for x in words]


def level_pairs(x, level):
    """(x where row and column are in a pair of blocks, that in the first blocks' rows, in the second's); else 0."""

    @plgpu.inline_mgpu(arg_types=(W, W), return_type=(plgpu.ShapeDtypeStruct((C, C), jnp.float16, W),) * 3)
    def run(_, x, level):
        return tuple(_array(words, jnp.float16) for words in _level_pairs(_words(x), level))

    return run(x, level)


def by_block(level, second, first):
    """Of two arrays [64, 64] of float16, one in the rows of second blocks, the other in those of first blocks."""

    @plgpu.inline_mgpu(arg_types=(W,) * 3, return_type=plgpu.ShapeDtypeStruct((C, C), jnp.float16, W))
    def run(_, level, a, b):
        second = _second(level.registers.item(), _position()[1])
        return _array([arith.select(second, *x) for x in zip(_words(a), _words(b), strict=True)], jnp.float16)

    return run(level, second, first)


def add_level(level, factor, x, dq, up, down):
    """Adds factor x[0] to dq in the rows of second blocks, to down in those of first ones, and factor x[1] to up."""

    @plgpu.inline_mgpu(arg_types=(W,) * 7, return_type=(plgpu.ShapeDtypeStruct((C, C), jnp.float32, W),) * 3)
    def run(_, level, factor, x, y, *sums):
        second = _second(level.registers.item(), _position()[1])
        factors = [f for word in _words(factor) for f in unpack(word)]
        x, y, dq, up, down = map(_scalars, (x, y, *sums))
        for i, f in enumerate(factors):
            dq[i] = fma_if(second, f, x[i], dq[i])
            down[i] = fma_if(second, f, x[i], down[i], False)
            up[i] = fma(f, y[i], up[i])
        return tuple(_rebuild(array, values) for array, values in zip(sums, (dq, up, down), strict=True))

    return run(level, factor, *x, dq, up, down)


def _elementwise(instruction):
    def apply(x):
        @plgpu.inline_mgpu(arg_types=(W,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, W))
        def run(ctx, x):
            fast = lambda value: _asm(f"{instruction}.approx.ftz.f32 $0, $1;", ["f"], [value], "f1")[0]
            return _rebuild(x, [fast(value) for value in _scalars(x)])

        return run(x)

    return apply


fast_exp2, fast_log2, fast_rsqrt = map(_elementwise, ("ex2", "lg2", "rsqrt"))


def _like(array, registers):
    return mosaic.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)


def cut(x):
    """Parts of 16 columns each."""
    part = plgpu.ShapeDtypeStruct((C, PART), jnp.float32, W)

    @plgpu.inline_mgpu(arg_types=(W,), return_type=(part,) * (C // PART))
    def run(ctx, x):
        return tuple(_like(x, registers) for registers in np.split(x.registers, C // PART, axis=1))

    return run(x)


def join(*parts):
    """Undoes `cut`."""

    @plgpu.inline_mgpu(arg_types=(W,) * len(parts), return_type=plgpu.ShapeDtypeStruct((C, C), jnp.float32, W))
    def run(ctx, *parts):
        return _like(parts[0], np.concatenate([x.registers for x in parts], 1))

    return run(*parts)
