// Causal attention over the paged KV pool, in place, with an online softmax in fp32.
//
// The unit of work is (sequence, KV head, tile of queries, stretch of context). All query heads that share a
// KV head are rows of one unit, so that each key and value is loaded once for the whole group. Units with few
// rows (decode) read the pool directly; units with many (chunks) convert 64 tokens at a time into L2, keys
// transposed, and multiply matrices.
//
// A sequence with one tile of queries is cut along its context too, so that a few long sequences keep many
// cores busy; the pieces are merged by their log-sum-exp. Where it is cut depends on that sequence alone, so
// a row's result is the same to the bit whatever else is in the batch and however many threads there are.

#include "simd.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t TILE_TOKENS = 64;
constexpr int64_t MAX_ROWS_DIRECT = 8;   // up to so many rows, transposing keys does not pay
constexpr int64_t MAX_ROWS_TILED = 96;   // queries, keys, values, scores and sums together fit L2
constexpr int64_t MIN_STRETCH = 512;     // tokens of context in one unit
constexpr int64_t MAX_STRETCHES = 32;    // bounds the memory for partial results
constexpr int64_t MAX_HEAD_DIM = 256;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

}  // namespace

// Mirrored by `_ATTENTION_CALL` in cpu_ops.py.
struct AttentionCall {
    const void* q;     // [T, H, E]
    const void* pool;  // [N, K, L, 2, B, E]
    void* out;         // [T, H, E]
    const int32_t* query_starts;
    const int32_t* context_lens;
    const int32_t* block_tables;
    int64_t num_sequences;
    int64_t table_width;
    int64_t layer;
    int64_t num_heads;
    int64_t num_blocks;
    int64_t num_kv_heads;
    int64_t num_layers;
    int64_t block_tokens;
    int64_t head_dim;
    int64_t window;  // 0: none
    int64_t activation_type;
    int64_t pool_type;
    int64_t num_threads;
    double scale;
};

namespace {

struct Unit {
    int64_t sequence, kv_head;
    int64_t first_query, num_queries;  // within the sequence's new tokens
    int64_t start, stop;               // positions of the context
    int64_t part;                      // where its partial result goes, in floats; -1: straight to the output
};

// The results of `num_parts` units that saw the same queries, one after the other from `first_part`.
struct Merge {
    int64_t sequence, kv_head, num_queries;
    int64_t first_part, num_parts;
};

// Running softmax of one row: largest score, sum of exponentials. The weighted values stand beside it.
struct RowState {
    float largest;
    float total;
};
constexpr RowState NO_SCORES = {NOTHING, 0};

// Geometry of a call: who sees what, and where tokens lie.
struct Shape : AttentionCall {
    int64_t group;         // query heads of a KV head
    int64_t row_stride;    // head_dim, rounded up to whole panels
    int64_t tile_queries;  // most queries of a unit
    int64_t block_stride;  // elements from one block to the next

    explicit Shape(const AttentionCall& call) : AttentionCall(call) {
        group = num_heads / num_kv_heads;
        row_stride = round_up(head_dim, TILE_COLS);
        tile_queries = max_of<int64_t>(1, MAX_ROWS_TILED / group);
        block_stride = num_kv_heads * num_layers * 2 * block_tokens * head_dim;
    }
    int64_t new_tokens(int64_t s) const { return query_starts[s + 1] - query_starts[s]; }
    int64_t position(int64_t s, int64_t query) const { return context_lens[s] - new_tokens(s) + query; }
    int64_t first_visible(int64_t position) const {
        return window == 0 ? 0 : max_of<int64_t>(0, position - window + 1);
    }
    int64_t stretch(int64_t context) const {
        return max_of(MIN_STRETCH, round_up(ceil_div(context, MAX_STRETCHES), TILE_TOKENS));
    }
    // A partial result: weighted values of each row, then the state of each row.
    int64_t part_floats(int64_t num_queries) const { return num_queries * group * (row_stride + 2); }

    // Elements from a token's key to its value.
    int64_t value_offset() const { return block_tokens * head_dim; }

    // Points keys[i] at the keys of tokens [first, first + count) of the unit's sequence and head.
    template <class T> void locate(const Unit& unit, int64_t first, int64_t count, const T** keys) const {
        const T* head = static_cast<const T*>(pool) +
                        (unit.kv_head * num_layers + layer) * 2 * block_tokens * head_dim;
        const int32_t* table = block_tables + unit.sequence * table_width;
        int64_t index = first / block_tokens, offset = first % block_tokens;
        for (int64_t i = 0; i < count; index++, offset = 0) {
            const T* block = head + table[index] * block_stride;
            const int64_t end = min_of(block_tokens, offset + count - i);
            for (; offset < end; offset++, i++) keys[i] = block + offset * head_dim;
        }
    }
};

// Turns scores of tokens [low, high) of a tile into weights, the others into 0, and updates the row: its
// running sum, and its weighted values for the new largest score.
void softmax_row(float* scores, int64_t columns, int64_t low, int64_t high, RowState& row, float* sums,
                 int64_t row_stride) {
    if (low >= high) {
        std::memset(scores, 0, columns * sizeof(float));
        return;
    }
    std::fill(scores, scores + low, NOTHING);
    std::fill(scores + high, scores + columns, NOTHING);
    VecF top = splat(row.largest);
    for (int64_t i = 0; i < columns; i += LANES) top = maximum(load(scores + i), top);
    const float new_largest = largest(top);
    VecF total{};
    for (int64_t i = 0; i < columns; i += LANES) {
        const VecF weights = exponential(load(scores + i) - new_largest);
        store(scores + i, weights);
        total += weights;
    }
    if (new_largest > row.largest) {
        const float shrink = exponential(splat(row.largest - new_largest))[0];
        row.total *= shrink;
        for (int64_t e = 0; e < row_stride; e += LANES) store(sums + e, load(sums + e) * shrink);
    }
    row.largest = new_largest;
    row.total += sum(total);
}

// Many rows -----------------------------------------------------------------------------------------------

template <class T>
void attend_tiled(const Shape& shape, const Unit& unit, const float* q, float* sums, RowState* rows) {
    static const T zeros[MAX_HEAD_DIM] = {};
    const int64_t dim = shape.head_dim, stride = shape.row_stride;
    const int64_t num_rows = unit.num_queries * shape.group;
    float* keys = scratch<3>(dim * TILE_TOKENS);
    float* values = scratch<4>(TILE_TOKENS * stride);
    float* scores = scratch<5>(num_rows * TILE_TOKENS);
    for (int64_t first = unit.start; first < unit.stop; first += TILE_TOKENS) {
        const int64_t count = min_of(TILE_TOKENS, unit.stop - first);
        const int64_t columns = round_up(count, TILE_COLS);
        const T* key_rows[TILE_TOKENS];
        shape.locate(unit, first, count, key_rows);
        std::fill(key_rows + count, key_rows + TILE_TOKENS, zeros);
        // Both in panels of TILE_COLS columns, each contiguous: with the stride of whole rows, a panel would
        // fall into a few sets of the L1 cache and throw itself out.
        for (int64_t token = 0; token < columns; token += LANES) {
            const T* some[LANES];
            std::copy(key_rows + token, key_rows + token + LANES, some);
            const int64_t column = token % TILE_COLS;
            transpose_rows(some, dim, keys + (token - column) * dim + column, TILE_COLS);
        }
        for (int64_t token = 0; token < count; token++) {
            const T* from = key_rows[token] + shape.value_offset();
            float* to = values + token * TILE_COLS;
            int64_t e = 0;
            for (; e + TILE_COLS <= dim; e += TILE_COLS) {
                store(to + e * TILE_TOKENS, load(from + e));
                store(to + e * TILE_TOKENS + LANES, load(from + e + LANES));
            }
            for (int64_t i = e; i < stride; i++)
                to[e * TILE_TOKENS + i - e] = i < dim ? to_float(from[i]) : 0;
        }

        // Rows before these see nothing of this tile: they belong to queries that precede it.
        const int64_t position = shape.position(unit.sequence, unit.first_query);
        const int64_t skipped = max_of<int64_t>(0, first - position) * shape.group;
        for (int64_t token = 0; token < columns; token += TILE_COLS)
            multiply_panel(num_rows - skipped, q + skipped * dim, dim, keys + token * dim, TILE_COLS,
                           scores + skipped * TILE_TOKENS + token, TILE_TOKENS, dim, false);
        for (int64_t row = skipped; row < num_rows; row++) {
            const int64_t at = position + row / shape.group;
            softmax_row(scores + row * TILE_TOKENS, columns,
                        max_of<int64_t>(0, shape.first_visible(at) - first), min_of(count, at + 1 - first),
                        rows[row], sums + row * stride, stride);
        }
        for (int64_t e = 0; e < stride; e += TILE_COLS)
            multiply_panel(num_rows - skipped, scores + skipped * TILE_TOKENS, TILE_TOKENS,
                           values + e * TILE_TOKENS, TILE_COLS, sums + skipped * stride + e, stride, count,
                           true);
    }
}

// Few rows ------------------------------------------------------------------------------------------------

// Memory for the next tile is asked for piece by piece while this one is computed, at the pace at which it
// arrives: keys beside keys, values beside values. In one burst it would only be waited for.
template <class T> INLINE void prefetch(const T* from, int64_t count) {
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t e = 0; e < count; e += line) __builtin_prefetch(from + e, 0, 2);
}

// scores[r, t] = q[r] . keys[t] for ROWS rows and all tokens of the tile; rows of scores are TILE_TOKENS
// apart. DIM is the head size where it is known, else 0. next_keys: of the next tile.
template <int ROWS, int DIM, class T>
void score_direct(const float* q, const T* const* keys, const T* const* next_keys, int64_t columns,
                  int64_t head_dim, float* scores) {
    constexpr int TOKENS = LANES / ROWS;
    const int64_t dim = DIM > 0 ? DIM : head_dim;
    for (int64_t token = 0; token < columns; token += TOKENS) {
        VecF parts[LANES] = {};
        const T* k[TOKENS];
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; t++) {
            k[t] = keys[token + t];
            prefetch(next_keys[token + t], dim);
        }
#pragma GCC unroll 16
        for (int64_t e = 0; e < dim; e += LANES) {
            VecF key[TOKENS];
#pragma GCC unroll 16
            for (int t = 0; t < TOKENS; t++) {
                key[t] = load(k[t] + e);
                keep_in_register(key[t]);
            }
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                const VecF query = load(q + r * dim + e);
#pragma GCC unroll 16
                for (int t = 0; t < TOKENS; t++)
                    parts[r * TOKENS + t] = multiply_add(query, key[t], parts[r * TOKENS + t]);
            }
        }
        float results[LANES];
        store(results, sum_each(parts));
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
            std::memcpy(scores + r * TILE_TOKENS + token, results + r * TOKENS, TOKENS * sizeof(float));
    }
}

// sums[r] += weights[r, t] * values[t] for ROWS rows and WIDTH vectors of the head, from element e on.
template <int ROWS, int WIDTH, class T>
INLINE void add_values(const float* weights, const T* const* keys, const T* const* next_keys,
                       int64_t value_offset, int64_t count, int64_t e, float* sums, int64_t stride) {
    const bool starts_line = e * sizeof(T) % 64 == 0;
    VecF parts[ROWS][WIDTH];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) parts[r][i] = load(sums + r * stride + e + i * LANES);
    for (int64_t token = 0; token < count; token++) {
        const T* from = keys[token] + value_offset + e;
        if (starts_line) prefetch(next_keys[token] + value_offset + e, WIDTH * LANES);
        VecF value[WIDTH];
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) value[i] = load(from + i * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const VecF weight = splat(weights[r * TILE_TOKENS + token]);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) parts[r][i] = multiply_add(weight, value[i], parts[r][i]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) store(sums + r * stride + e + i * LANES, parts[r][i]);
}

template <int ROWS, class T>
void add_values_direct(const float* weights, const T* const* keys, const T* const* next_keys,
                       int64_t value_offset, int64_t count, int64_t dim, float* sums, int64_t stride) {
    constexpr int WIDTH = 8 / ROWS;
    int64_t e = 0;
    for (; e + WIDTH * LANES <= dim; e += WIDTH * LANES)
        add_values<ROWS, WIDTH>(weights, keys, next_keys, value_offset, count, e, sums, stride);
    for (; e < dim; e += LANES)
        add_values<ROWS, 1>(weights, keys, next_keys, value_offset, count, e, sums, stride);
}

// Calls `body` with the size of each group of 4, 2 or 1 rows, as a constant, and its first row.
template <class Body> void for_row_groups(int64_t rows, Body body) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) body(std::integral_constant<int, 4>{}, row);
    if (row + 2 <= rows) {
        body(std::integral_constant<int, 2>{}, row);
        row += 2;
    }
    if (row < rows) body(std::integral_constant<int, 1>{}, row);
}

// head_dim must be a multiple of LANES.
template <int DIM, class T>
void attend_direct(const Shape& shape, const Unit& unit, const float* q, float* sums, RowState* rows) {
    const int64_t dim = shape.head_dim, stride = shape.row_stride, value_offset = shape.value_offset();
    const int64_t num_rows = unit.num_queries * shape.group;
    const int64_t position = shape.position(unit.sequence, unit.first_query);
    float scores[MAX_ROWS_DIRECT * TILE_TOKENS];
    const T* tiles[2][TILE_TOKENS];
    const T** keys = tiles[0];
    const T** next_keys = tiles[1];
    int64_t count = min_of(TILE_TOKENS, unit.stop - unit.start);
    shape.locate(unit, unit.start, count, keys);
    for (int64_t first = unit.start; first < unit.stop; first += TILE_TOKENS) {
        const int64_t next_count = max_of<int64_t>(0, min_of(TILE_TOKENS, unit.stop - first - count));
        shape.locate(unit, first + count, next_count, next_keys);
        // Scores come in whole vectors: tokens beyond the end repeat the last one and are masked below.
        const int64_t columns = round_up(count, LANES);
        std::fill(keys + count, keys + columns, keys[count - 1]);
        std::fill(next_keys + next_count, next_keys + TILE_TOKENS, keys[0]);
        for_row_groups(num_rows, [&](auto size, int64_t row) {
            score_direct<size(), DIM>(q + row * dim, keys, next_keys, columns, dim,
                                      scores + row * TILE_TOKENS);
        });
        for (int64_t row = 0; row < num_rows; row++) {
            const int64_t at = position + row / shape.group;
            softmax_row(scores + row * TILE_TOKENS, columns,
                        max_of<int64_t>(0, shape.first_visible(at) - first), min_of(count, at + 1 - first),
                        rows[row], sums + row * stride, stride);
        }
        for_row_groups(num_rows, [&](auto size, int64_t row) {
            add_values_direct<size()>(scores + row * TILE_TOKENS, keys, next_keys, value_offset, count, dim,
                                      sums + row * stride, stride);
        });
        std::swap(keys, next_keys);
        count = next_count;
    }
}

// -----------------------------------------------------------------------------------------------------------

template <class A>
void load_queries(const Shape& shape, const Unit& unit, float* to) {
    const int64_t first = shape.query_starts[unit.sequence] + unit.first_query;
    const int64_t count = shape.group * shape.head_dim;  // heads of a group lie side by side
    for (int64_t query = 0; query < unit.num_queries; query++) {
        const A* from = static_cast<const A*>(shape.q) +
                        ((first + query) * shape.num_heads + unit.kv_head * shape.group) * shape.head_dim;
        for (int64_t i = 0; i < count; i++)
            to[query * count + i] = to_float(from[i]) * static_cast<float>(shape.scale);
    }
}

template <class A>
void write_row(const Shape& shape, int64_t sequence, int64_t kv_head, int64_t query, int64_t head,
               const float* sums, float total) {
    A* to = static_cast<A*>(shape.out) + ((shape.query_starts[sequence] + query) * shape.num_heads +
                                          kv_head * shape.group + head) *
                                             shape.head_dim;
    const float factor = 1 / total;
    for (int64_t e = 0; e < shape.head_dim; e++) assign(to[e], sums[e] * factor);
}

template <class A, class T> void run_unit(const Shape& shape, const Unit& unit, float* parts) {
    const int64_t num_rows = unit.num_queries * shape.group;
    float* q = scratch<1>(num_rows * shape.head_dim);
    load_queries<A>(shape, unit, q);
    float* sums = unit.part < 0 ? scratch<2>(shape.part_floats(unit.num_queries)) : parts + unit.part;
    std::memset(sums, 0, num_rows * shape.row_stride * sizeof(float));
    auto* rows = reinterpret_cast<RowState*>(sums + num_rows * shape.row_stride);
    std::fill(rows, rows + num_rows, NO_SCORES);
    if (num_rows > MAX_ROWS_DIRECT || shape.head_dim % LANES != 0)
        attend_tiled<T>(shape, unit, q, sums, rows);
    else if (shape.head_dim == 128)
        attend_direct<128, T>(shape, unit, q, sums, rows);
    else if (shape.head_dim == 64)
        attend_direct<64, T>(shape, unit, q, sums, rows);
    else
        attend_direct<0, T>(shape, unit, q, sums, rows);
    if (unit.part >= 0) return;
    for (int64_t row = 0; row < num_rows; row++)
        write_row<A>(shape, unit.sequence, unit.kv_head, unit.first_query + row / shape.group,
                     row % shape.group, sums + row * shape.row_stride, rows[row].total);
}

template <class A> void run_merge(const Shape& shape, const Merge& merge, const float* parts) {
    const int64_t num_rows = merge.num_queries * shape.group, stride = shape.row_stride;
    const int64_t part_floats = shape.part_floats(merge.num_queries);
    const float* first = parts + merge.first_part;
    float* sums = scratch<2>(stride);
    for (int64_t row = 0; row < num_rows; row++) {
        const auto* state = reinterpret_cast<const RowState*>(first + num_rows * stride) + row;
        const int64_t part_states = part_floats / 2;  // a state is two floats
        RowState all = NO_SCORES;
        for (int64_t part = 0; part < merge.num_parts; part++)
            all.largest = max_of(all.largest, state[part * part_states].largest);
        std::memset(sums, 0, stride * sizeof(float));
        for (int64_t part = 0; part < merge.num_parts; part++) {
            const RowState& one = state[part * part_states];
            const float weight = exponential(splat(one.largest - all.largest))[0];
            const float* from = first + part * part_floats + row * stride;
            all.total += one.total * weight;
            for (int64_t e = 0; e < stride; e += LANES)
                store(sums + e, load(sums + e) + load(from + e) * weight);
        }
        write_row<A>(shape, merge.sequence, merge.kv_head, row / shape.group, row % shape.group, sums,
                     all.total);
    }
}

template <class A, class T> void attention(const Shape& shape) {
    static thread_local std::vector<Unit> units;
    static thread_local std::vector<Merge> merges;
    units.clear();
    merges.clear();
    int64_t floats = 0, work = 0;  // floats: of partial results so far
    for (int64_t s = 0; s < shape.num_sequences; s++) {
        const int64_t queries = shape.new_tokens(s), context = shape.context_lens[s];
        const int64_t tiles = ceil_div(queries, shape.tile_queries);
        const int64_t stretch = tiles == 1 ? shape.stretch(context) : context;
        // Last tiles first: they see the most context, and what starts last should be short.
        for (int64_t tile = tiles - 1; tile >= 0; tile--) {
            const int64_t first_query = tile * shape.tile_queries;
            const int64_t num_queries = min_of(shape.tile_queries, queries - first_query);
            const int64_t start = shape.first_visible(shape.position(s, first_query));
            const int64_t stop = shape.position(s, first_query + num_queries - 1) + 1;
            const int64_t stretches = ceil_div(stop - start, stretch);
            for (int64_t head = 0; head < shape.num_kv_heads; head++) {
                if (stretches == 1) {
                    units.push_back({s, head, first_query, num_queries, start, stop, -1});
                    continue;
                }
                merges.push_back({s, head, num_queries, floats, stretches});
                for (int64_t i = 0; i < stretches; i++, floats += shape.part_floats(num_queries))
                    units.push_back({s, head, first_query, num_queries, start + i * stretch,
                                     min_of(stop, start + (i + 1) * stretch), floats});
                work += num_queries * shape.group * (stop - start) * shape.head_dim;
            }
        }
    }
    float* parts = scratch<0>(floats);
    const int threads = work < 65536 ? 1 : static_cast<int>(shape.num_threads);
    const Unit* all_units = units.data();
    const Merge* all_merges = merges.data();
    const int64_t num_units = units.size(), num_merges = merges.size();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_units; i++) run_unit<A, T>(shape, all_units[i], parts);
        if (num_merges > 0) {
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < num_merges; i++) run_merge<A>(shape, all_merges[i], parts);
        }
    }
}

// Whether every block that will be read exists: a bad id must not become another request's memory.
bool valid(const Shape& shape) {
    for (int64_t s = 0; s < shape.num_sequences; s++) {
        const int64_t context = shape.context_lens[s], queries = shape.new_tokens(s);
        if (queries < 1 || context < queries) return false;
        if (ceil_div(context, shape.block_tokens) > shape.table_width) return false;
        const int64_t first = shape.first_visible(context - queries) / shape.block_tokens;
        for (int64_t i = first; i * shape.block_tokens < context; i++) {
            const int32_t block = shape.block_tables[s * shape.table_width + i];
            if (block < 0 || block >= shape.num_blocks) return false;
        }
    }
    return true;
}

}  // namespace

// Reads q and the pool, writes out. Returns 0, or 1 if the batch does not fit the pool (nothing is done).
extern "C" int tandem_paged_attention(const AttentionCall* call) {
    const Shape shape(*call);
    if (!valid(shape)) return 1;
    if (call->activation_type == FLOAT32) {
        if (call->pool_type == FLOAT32)
            attention<float, float>(shape);
        else
            attention<float, BFloat16>(shape);
    } else {
        if (call->pool_type == FLOAT32)
            attention<BFloat16, float>(shape);
        else
            attention<BFloat16, BFloat16>(shape);
    }
    return 0;
}
