// y = x @ w.T + bias for weights as the checkpoint stores them: rows of `in` elements, fp32 or bf16.
//
// The weight is never repacked for keeps, so it can live in read-only memory that processes share. Two ways
// to multiply, by the number of rows of x:
//
// - few rows (decode): each output is a dot product along the weight's row. x is small and is laid out once
//   so that it streams from L1; weights come from memory once, converted to fp32 in registers.
// - many rows (prefill): a panel of weight rows is transposed into L1 (as fp32), then meets every row of x.
//
// Both accumulate in fp32, in an order that depends on the shape of the weight only: a row's result is the
// same to the bit whatever the other rows of its call and the number of threads are, as long as the same way
// is taken.

#include "simd.h"

// x: [rows, in], weight: [out_features, in], out: [rows, out_features], all contiguous. Mirrored by
// `_LINEAR_CALL` in cpu_ops.py.
struct LinearCall {
    const void* x;
    const void* weight;
    const float* bias;  // or null
    void* out;
    int64_t x_type;
    int64_t weight_type;
    int64_t out_type;
    int64_t rows;
    int64_t in;
    int64_t out_features;
    int64_t many;  // which way
    int64_t num_threads;
};

namespace {

template <class T>
void write_outputs(const float* sums, const float* bias, T* to, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(to + i, bias ? load(sums + i) + load(bias + i) : load(sums + i));
    for (; i < count; i++) assign(to[i], bias ? sums[i] + bias[i] : sums[i]);
}

// Rounds sums[rows, stride] into columns [first, first + count) of rows [first_row, ..) of the output.
void finish(const LinearCall& op, const float* sums, int64_t stride, int64_t first_row, int64_t rows,
            int64_t first, int64_t count) {
    const float* bias = op.bias ? op.bias + first : nullptr;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = (first_row + row) * op.out_features + first;
        if (op.out_type == FLOAT32)
            write_outputs(sums + row * stride, bias, static_cast<float*>(op.out) + at, count);
        else
            write_outputs(sums + row * stride, bias, static_cast<BFloat16*>(op.out) + at, count);
    }
}

// Few rows ------------------------------------------------------------------------------------------------

constexpr int64_t STEP = 2 * LANES;  // elements of a row handled at once
constexpr int64_t DEPTH_FEW = 1024;  // of a row, before partial sums are put away

// Rows of x that meet in registers. Taller tiles read the weights less often, but with bf16 the compiler then
// spills: 74 GFLOP/s against 63 on an AVX2 core with a peak of 90.
template <class W> constexpr int max_tile_few = LANES == 16 ? 8 : sizeof(W) == 2 ? 4 : 6;

constexpr int64_t OUT_BLOCK_FEW = 24;  // outputs of one unit of work; every weight_rows() divides it
constexpr int64_t LINE_BYTES = 64;

// How many weight rows meet ROWS rows of x: the accumulators, the shorter of the two operands, one vector of
// the longer, and the mask for bf16 must fit the registers.
template <int ROWS> constexpr int weight_rows() {
    constexpr int registers = (LANES == 16 ? 32 : 16) - 1;
    int best = 1;
    for (int outs = 2; outs <= 8; outs++)
        if (OUT_BLOCK_FEW % outs == 0 && ROWS * outs + min_of(ROWS, outs) + 1 <= registers) best = outs;
    return best;
}

// Half of STEP elements, in the order that lay_out_few() gives x. A 32-bit word holds two bf16: shifting or
// masking it costs half of widening.
template <int HALF> INLINE VecF load_half(const float* w) { return load(w + HALF * LANES); }

template <int HALF> INLINE VecF load_half(const BFloat16* w) {
    const VecU words = *reinterpret_cast<const UnalignedU*>(w);
    return reinterpret_cast<VecF>(HALF == 0 ? words << 16 : words & 0xffff0000u);
}

template <int HALF, int ROWS, int OUTS, class W>
INLINE void multiply_half(const W* w, int64_t w_stride, const float* x, VecF (&sums)[ROWS * OUTS]) {
    x += HALF * LANES;
    if constexpr (ROWS < OUTS) {
        VecF values[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) values[r] = load(x + r * STEP);
#pragma GCC unroll 8
        for (int j = 0; j < OUTS; j++) {
            const VecF weights = load_half<HALF>(w + j * w_stride);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
                sums[r * OUTS + j] = multiply_add(values[r], weights, sums[r * OUTS + j]);
        }
    } else {
        VecF weights[OUTS];
#pragma GCC unroll 8
        for (int j = 0; j < OUTS; j++) weights[j] = load_half<HALF>(w + j * w_stride);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const VecF values = load(x + r * STEP);
#pragma GCC unroll 8
            for (int j = 0; j < OUTS; j++)
                sums[r * OUTS + j] = multiply_add(values, weights[j], sums[r * OUTS + j]);
        }
    }
}

template <int ROWS, int OUTS, class W>
INLINE void multiply_step(const W* w, int64_t w_stride, const float* x, VecF (&sums)[ROWS * OUTS]) {
    multiply_half<0, ROWS, OUTS>(w, w_stride, x, sums);
    // Keeps the compiler from holding the words of all rows for the second half: it would spill sums instead.
    asm("" : "+r"(w));
    multiply_half<1, ROWS, OUTS>(w, w_stride, x, sums);
}

// out[r * OUT_BLOCK_FEW + j] += x[r] . w[j] over `depth` elements, for OUTS weight rows `w_stride` apart.
// x: [depth / STEP][ROWS][STEP], padded with zeros. Brings near what lies `ahead` bytes after the weights it
// reads, unless that is 0.
template <int ROWS, int OUTS, class W>
void multiply_few(const W* w, int64_t w_stride, const float* x, int64_t depth, int64_t ahead, float* out) {
    constexpr int64_t step_bytes = STEP * sizeof(W);
    constexpr int steps = step_bytes < LINE_BYTES ? LINE_BYTES / step_bytes : 1;  // one line of each row
    VecF sums[ROWS * OUTS] = {};
    int64_t k = 0;
    while (k + steps * STEP <= depth) {
        if (ahead != 0) {
            const char* line = reinterpret_cast<const char*>(w + k) + ahead;
#pragma GCC unroll 8
            for (int j = 0; j < OUTS; j++)
#pragma GCC unroll 2
                for (int64_t byte = 0; byte < step_bytes; byte += LINE_BYTES)
                    __builtin_prefetch(line + j * w_stride * sizeof(W) + byte, 0, 2);
        }
#pragma GCC unroll 4
        for (int i = 0; i < steps; i++, k += STEP, x += ROWS * STEP)
            multiply_step<ROWS, OUTS>(w + k, w_stride, x, sums);
    }
    for (; k < depth; k += STEP, x += ROWS * STEP) {
        W padded[OUTS][STEP] = {};
        for (int j = 0; j < OUTS; j++)
            std::memcpy(padded[j], w + j * w_stride + k, min_of(STEP, depth - k) * sizeof(W));
        multiply_step<ROWS, OUTS>(padded[0], STEP, x, sums);
    }
    constexpr int total = ROWS * OUTS;
#pragma GCC unroll 16
    for (int first = 0; first < total; first += LANES) {
        VecF group[LANES] = {};
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (first + i < total) group[i] = sums[first + i];
        const VecF results = sum_each(group);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (first + i < total) out[(first + i) / OUTS * OUT_BLOCK_FEW + (first + i) % OUTS] += results[i];
    }
}

// Where the pieces of x lie: blocks of DEPTH_FEW along the depth, in each the tiles of rows.
struct RowTiles {
    int64_t rows, depth, tiles;

    RowTiles(int64_t rows, int64_t depth, int64_t max_tile)
        : rows(rows), depth(depth), tiles(ceil_div(rows, max_tile)) {}
    // Tiles differ by one row at most: 7 rows are 4 + 3, as 6 + 1 would waste the second pass.
    int64_t start(int64_t tile) const { return tile * rows / tiles; }
    int64_t size(int64_t tile) const { return start(tile + 1) - start(tile); }
    int64_t padded_depth() const { return round_up(depth, STEP); }
    int64_t offset(int64_t tile, int64_t k) const {
        return k * rows + min_of(DEPTH_FEW, padded_depth() - k) * start(tile);
    }
};

template <class X, class W> void lay_out_few(const X* x, const RowTiles& tiles, float* to) {
    for (int64_t block = 0; block < tiles.depth; block += DEPTH_FEW)
        for (int64_t tile = 0; tile < tiles.tiles; tile++)
            for (int64_t r = 0; r < tiles.size(tile); r++) {
                const X* row = x + (tiles.start(tile) + r) * tiles.depth;
                float* at = to + tiles.offset(tile, block) + r * STEP;
                const int64_t end = min_of(tiles.depth, block + DEPTH_FEW);
                for (int64_t k = block; k < end; k += STEP, at += tiles.size(tile) * STEP) {
                    float values[STEP] = {};
                    const int64_t count = min_of(STEP, end - k);
                    for (int64_t i = 0; i < count; i++) values[i] = to_float(row[k + i]);
                    for (int64_t i = 0; i < STEP; i++)
                        at[i] = sizeof(W) == 4 ? values[i] : values[i % LANES * 2 + i / LANES];
                }
            }
}

template <int ROWS, class W>
void multiply_block_few(const LinearCall& op, const W* weight, int64_t first, int64_t block, const float* x,
                        int64_t ahead, float* out) {
    constexpr int OUTS = weight_rows<ROWS>();
    static_assert(OUT_BLOCK_FEW % OUTS == 0);
    const int64_t depth = min_of(DEPTH_FEW, op.in - block);
    const int64_t count = min_of(OUT_BLOCK_FEW, op.out_features - first);
    const W* w = weight + first * op.in + block;
    int64_t o = 0;
    for (; o + OUTS <= count; o += OUTS)
        multiply_few<ROWS, OUTS>(w + o * op.in, op.in, x, depth, ahead, out + o);
    // The last outputs, if they fill no tile: the same code on one row repeated, for the same rounding.
    for (; o < count; o++) {
        float repeated[ROWS * OUT_BLOCK_FEW] = {};
        multiply_few<ROWS, OUTS>(w + o * op.in, 0, x, depth, ahead, repeated);
        for (int r = 0; r < ROWS; r++) out[r * OUT_BLOCK_FEW + o] += repeated[r * OUT_BLOCK_FEW];
    }
}

// Calls the instance for `rows` rows.
template <class W, int ROWS = max_tile_few<W>, class... Args>
void multiply_rows_few(int64_t rows, Args... args) {
    if (rows == ROWS)
        multiply_block_few<ROWS, W>(args...);
    else if constexpr (ROWS > 1)
        multiply_rows_few<W, ROWS - 1>(rows, args...);
}

template <class W> void linear_few(const LinearCall& op, const W* weight, int num_threads) {
    const RowTiles tiles(op.rows, op.in, max_tile_few<W>);
    float* x = scratch<0>(op.rows * tiles.padded_depth());
    if (op.x_type == FLOAT32)
        lay_out_few<float, W>(static_cast<const float*>(op.x), tiles, x);
    else
        lay_out_few<BFloat16, W>(static_cast<const BFloat16*>(op.x), tiles, x);

    const int64_t blocks = ceil_div(op.out_features, OUT_BLOCK_FEW);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t first = b * OUT_BLOCK_FEW;
        float* sums = scratch<1>(op.rows * OUT_BLOCK_FEW);
        std::memset(sums, 0, op.rows * OUT_BLOCK_FEW * sizeof(float));
        for (int64_t block = 0; block < op.in; block += DEPTH_FEW) {
            // While the first tile reads this part of the weight rows, the next part is on its way.
            const int64_t next = block + DEPTH_FEW < op.in ? DEPTH_FEW : OUT_BLOCK_FEW * op.in - block;
            for (int64_t tile = 0; tile < tiles.tiles; tile++)
                multiply_rows_few<W>(tiles.size(tile), op, weight, first, block,
                                     x + tiles.offset(tile, block),
                                     tile == 0 ? next * static_cast<int64_t>(sizeof(W)) : 0,
                                     sums + tiles.start(tile) * OUT_BLOCK_FEW);
        }
        finish(op, sums, OUT_BLOCK_FEW, 0, op.rows, first, min_of(OUT_BLOCK_FEW, op.out_features - first));
    }
}

// Many rows -----------------------------------------------------------------------------------------------

constexpr int64_t DEPTH_MANY = 256;                        // a weight panel is 16 KiB with AVX2: half of L1
constexpr int64_t ROWS_MANY = 384;                         // a block of x is 384 KiB, for L2
constexpr int64_t OUT_BLOCK_MANY = LANES == 16 ? 128 : 64;  // outputs of one unit of work

// to[row, :depth] = x[row, :depth] as fp32; rows of `to` are DEPTH_MANY apart.
template <class X> void convert_rows(const X* x, int64_t x_stride, int64_t rows, int64_t depth, float* to) {
    for (int64_t row = 0; row < rows; row++, x += x_stride, to += DEPTH_MANY) {
        int64_t k = 0;
        for (; k + LANES <= depth; k += LANES) store(to + k, load(x + k));
        for (; k < depth; k++) to[k] = to_float(x[k]);
    }
}

template <class W> void linear_many(const LinearCall& op, const W* weight, int num_threads) {
    const int64_t slabs = ceil_div(op.in, DEPTH_MANY);
    const int64_t out_blocks = ceil_div(op.out_features, OUT_BLOCK_MANY);
    // Equal blocks of rows, so that none is left with a few rows only.
    const int64_t row_blocks = ceil_div(op.rows, ROWS_MANY);
    const int64_t block_rows = ceil_div(op.rows, row_blocks);
    float* x = scratch<0>(slabs * block_rows * DEPTH_MANY);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    for (int64_t first_row = 0; first_row < op.rows; first_row += block_rows) {
        const int64_t rows = min_of(block_rows, op.rows - first_row);
#pragma omp for
        for (int64_t slab = 0; slab < slabs; slab++) {
            const int64_t at = first_row * op.in + slab * DEPTH_MANY;
            const int64_t depth = min_of(DEPTH_MANY, op.in - slab * DEPTH_MANY);
            float* to = x + slab * block_rows * DEPTH_MANY;
            if (op.x_type == FLOAT32)
                convert_rows(static_cast<const float*>(op.x) + at, op.in, rows, depth, to);
            else
                convert_rows(static_cast<const BFloat16*>(op.x) + at, op.in, rows, depth, to);
        }
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < out_blocks; b++) {
            const int64_t first = b * OUT_BLOCK_MANY;
            const int64_t count = min_of(OUT_BLOCK_MANY, op.out_features - first);
            float* sums = scratch<1>(rows * OUT_BLOCK_MANY);
            float* panel = scratch<2>(DEPTH_MANY * TILE_COLS);
            for (int64_t slab = 0; slab < slabs; slab++) {
                const int64_t depth = min_of(DEPTH_MANY, op.in - slab * DEPTH_MANY);
                for (int64_t o = 0; o < count; o += TILE_COLS) {
                    for (int half = 0; half < TILE_COLS; half += LANES) {
                        const W* w[LANES];
                        for (int i = 0; i < LANES; i++)
                            w[i] = weight + min_of(first + o + half + i, op.out_features - 1) * op.in +
                                   slab * DEPTH_MANY;
                        transpose_rows(w, depth, panel + half, TILE_COLS);
                    }
                    multiply_panel(rows, x + slab * block_rows * DEPTH_MANY, DEPTH_MANY, panel, TILE_COLS,
                                   sums + o, OUT_BLOCK_MANY, depth, slab != 0);
                }
            }
            finish(op, sums, OUT_BLOCK_MANY, first_row, rows, first, count);
        }
    }
}

template <class W> void linear(const LinearCall& op) {
    const W* weight = static_cast<const W*>(op.weight);
    // Waking a team costs microseconds: so many multiplications are done before.
    const int threads = op.rows * op.in * op.out_features < 65536 ? 1 : static_cast<int>(op.num_threads);
    if (op.many)
        linear_many(op, weight, threads);
    else
        linear_few(op, weight, threads);
}

}  // namespace

extern "C" int tandem_linear(const LinearCall* call) {
    call->weight_type == FLOAT32 ? linear<float>(*call) : linear<BFloat16>(*call);
    return 0;
}
