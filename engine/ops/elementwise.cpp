// Norms, rotary embedding with the KV write, and the gated activation: one pass over memory each.

#include "simd.h"

#include <cmath>

namespace {

constexpr int64_t PARALLEL_FROM = 131072;  // elements; fewer are done before a second thread is awake

INLINE int threads_for(int64_t elements, int64_t num_threads) {
    return elements < PARALLEL_FROM ? 1 : static_cast<int>(num_threads);
}

template <class T> float sum_of_squares(const T* x, int64_t count) {
    VecF parts[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int j = 0; j < 4; j++) {
            const VecF value = load(x + i + j * LANES);
            parts[j] += value * value;
        }
    for (; i + LANES <= count; i += LANES) {
        const VecF value = load(x + i);
        parts[0] += value * value;
    }
    float total = sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
    for (; i < count; i++) total += to_float(x[i]) * to_float(x[i]);
    return total;
}

// to = round(x / rms(x)) * weight; `to` may be x.
template <class T> void norm_row(const T* x, const T* weight, int64_t count, float eps, T* to) {
    const float factor = 1 / std::sqrt(sum_of_squares(x, count) / static_cast<float>(count) + eps);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(to + i, round_to<T>(load(x + i) * factor) * load(weight + i));
    for (; i < count; i++) assign(to[i], round_to<T>(to_float(x[i]) * factor) * to_float(weight[i]));
}

template <class T> void add_row(const T* x, T* residual, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(residual + i, load(residual + i) + load(x + i));
    for (; i < count; i++) assign(residual[i], to_float(residual[i]) + to_float(x[i]));
}

template <class T>
void rms_norm(const T* x, T* residual, const T* weight, int64_t rows, int64_t width, float eps, T* out,
              int64_t num_threads) {
    const int threads = threads_for(rows * width, num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row * width;
        if (residual != nullptr) {
            add_row(from, residual + row * width, width);
            from = residual + row * width;
        }
        norm_row(from, weight, width, eps, out + row * width);
    }
}

// Rotates one head: pairs (i, i + half) by angle i. `to` may be x.
template <class T, class To> void rotate(const T* x, const float* cos_sin, int64_t head_dim, To* to) {
    const int64_t half = head_dim / 2;
    const float* cosines = cos_sin;
    const float* sines = cos_sin + half;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const VecF a = load(x + i), b = load(x + half + i), c = load(cosines + i), s = load(sines + i);
        store(to + i, a * c - b * s);
        store(to + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = to_float(x[i]), b = to_float(x[half + i]);
        assign(to[i], a * cosines[i] - b * sines[i]);
        assign(to[half + i], b * cosines[i] + a * sines[i]);
    }
}

template <class T> void silu_mul(const T* gate_up, int64_t rows, int64_t width, T* out, int64_t num_threads) {
    const int threads = threads_for(rows * width, num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const T* gate = gate_up + row * 2 * width;
        const T* up = gate + width;
        T* to = out + row * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            const VecF x = load(gate + i);
            store(to + i, round_to<T>(x / (1.0f + exponential(-x))) * load(up + i));
        }
        for (; i < width; i++) {
            const float x = to_float(gate[i]);
            assign(to[i], round_to<T>(x / (1.0f + std::exp(-x))) * to_float(up[i]));
        }
    }
}

}  // namespace

// The calls are mirrored by `struct.Struct`s of the same names in cpu_ops.py.
struct NormCall {
    const void* x;       // [rows, width]
    void* residual;      // [rows, width], or null; x is added to it before the norm
    const void* weight;  // [width]
    void* out;           // [rows, width]
    int64_t rows;
    int64_t width;
    int64_t type;
    int64_t num_threads;
    double eps;
};

struct SiluCall {
    const void* gate_up;  // [rows, 2 * width]
    void* out;            // [rows, width]
    int64_t rows;
    int64_t width;
    int64_t type;
    int64_t num_threads;
};

struct RopeCall {
    void* qkv;                 // [T, (H + 2K) * E]
    const float* cos_sin;      // [P, E]
    void* pool;                // [N, K, L, 2, B, E]
    void* q_out;               // [T, H, E]
    const int64_t* positions;  // [T]
    const int64_t* slots;      // [T]
    const void* q_norm;        // [E], or null
    const void* k_norm;
    int64_t num_tokens;
    int64_t num_positions;
    int64_t layer;
    int64_t num_heads;
    int64_t num_blocks;
    int64_t num_kv_heads;
    int64_t num_layers;
    int64_t block_tokens;
    int64_t head_dim;
    int64_t activation_type;
    int64_t pool_type;
    int64_t num_threads;
    double eps;
};

namespace {

template <class A, class T> void rope_and_write_kv(const RopeCall& call) {
    const int64_t dim = call.head_dim, kv_heads = call.num_kv_heads;
    const int64_t row_width = (call.num_heads + 2 * kv_heads) * dim;
    const int threads = threads_for(call.num_tokens * row_width, call.num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t token = 0; token < call.num_tokens; token++) {
        A* row = static_cast<A*>(call.qkv) + token * row_width;
        const float* cos_sin = call.cos_sin + call.positions[token] * dim;
        for (int64_t head = 0; head < call.num_heads; head++, row += dim) {
            A* to = static_cast<A*>(call.q_out) + (token * call.num_heads + head) * dim;
            if (call.q_norm)
                norm_row(row, static_cast<const A*>(call.q_norm), dim, static_cast<float>(call.eps), row);
            rotate(row, cos_sin, dim, to);
        }
        const int64_t block = call.slots[token] / call.block_tokens;
        const int64_t offset = call.slots[token] % call.block_tokens;
        for (int64_t head = 0; head < kv_heads; head++, row += dim) {
            T* key = static_cast<T*>(call.pool) +
                     ((((block * kv_heads + head) * call.num_layers + call.layer) * 2) * call.block_tokens +
                      offset) *
                         dim;
            T* value = key + call.block_tokens * dim;
            const A* from = row + kv_heads * dim;
            if (call.k_norm)
                norm_row(row, static_cast<const A*>(call.k_norm), dim, static_cast<float>(call.eps), row);
            rotate(row, cos_sin, dim, key);
            for (int64_t i = 0; i < dim; i++) assign(value[i], to_float(from[i]));
        }
    }
}

// Whether every position and slot exists: a bad slot must not become another request's memory.
bool valid(const RopeCall& call) {
    for (int64_t token = 0; token < call.num_tokens; token++) {
        if (call.positions[token] < 0 || call.positions[token] >= call.num_positions) return false;
        if (call.slots[token] < 0 || call.slots[token] >= call.num_blocks * call.block_tokens) return false;
    }
    return true;
}

template <class T> void rms_norm(const NormCall& call) {
    rms_norm(static_cast<const T*>(call.x), static_cast<T*>(call.residual),
             static_cast<const T*>(call.weight), call.rows, call.width, static_cast<float>(call.eps),
             static_cast<T*>(call.out), call.num_threads);
}

template <class T> void silu_mul(const SiluCall& call) {
    silu_mul(static_cast<const T*>(call.gate_up), call.rows, call.width, static_cast<T*>(call.out),
             call.num_threads);
}

}  // namespace

// Floats in a vector of this build.
extern "C" int tandem_lanes() { return LANES; }

// All functions return 0, or 1 if the call does not fit its tensors (nothing is done).

extern "C" int tandem_rms_norm(const NormCall* call) {
    call->type == FLOAT32 ? rms_norm<float>(*call) : rms_norm<BFloat16>(*call);
    return 0;
}

extern "C" int tandem_silu_mul(const SiluCall* call) {
    call->type == FLOAT32 ? silu_mul<float>(*call) : silu_mul<BFloat16>(*call);
    return 0;
}

extern "C" int tandem_rope_and_write_kv(const RopeCall* call) {
    if (!valid(*call)) return 1;
    if (call->activation_type == FLOAT32) {
        if (call->pool_type == FLOAT32)
            rope_and_write_kv<float, float>(*call);
        else
            rope_and_write_kv<float, BFloat16>(*call);
    } else {
        if (call->pool_type == FLOAT32)
            rope_and_write_kv<BFloat16, float>(*call);
        else
            rope_and_write_kv<BFloat16, BFloat16>(*call);
    }
    return 0;
}
