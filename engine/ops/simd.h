// Vectors, conversions and scratch memory shared by the CPU kernels.
//
// Everything is written with the compiler's generic vectors, so that one source serves every instruction
// set: 16 lanes with AVX-512, 8 with AVX2, 4 elsewhere (SSE2, NEON, or plain scalars where a machine has
// neither). TANDEM_LANES overrides the width; the compiler splits vectors that the machine does not have,
// which lets a test run the 16-lane code on an AVX2 machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(TANDEM_LANES)
#if defined(__AVX512F__)
#define TANDEM_LANES 16
#elif defined(__AVX2__)
#define TANDEM_LANES 8
#else
#define TANDEM_LANES 4
#endif
#endif
constexpr int LANES = TANDEM_LANES;

#define INLINE inline __attribute__((always_inline))

typedef float VecF __attribute__((vector_size(LANES * 4)));
typedef int32_t VecI __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecU __attribute__((vector_size(LANES * 4)));
typedef uint16_t VecH __attribute__((vector_size(LANES * 2)));

// The same vectors at any address, for loads and stores.
typedef float UnalignedF __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t UnalignedU __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
typedef uint16_t UnalignedH __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct BFloat16 {
    uint16_t bits;
};

// Element types as the Python side numbers them.
enum ElementType : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };

// Not 0 + x: that would turn -0 into 0, hence cost an addition.
INLINE VecF splat(float x) { return x - VecF{}; }

INLINE VecF load(const float* p) { return *reinterpret_cast<const UnalignedF*>(p); }

INLINE VecF load(const BFloat16* p) {
    // The generic conversion takes five instructions where the machine has one.
#if defined(__AVX512F__) && TANDEM_LANES == 16
    const auto words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && TANDEM_LANES == 8
    const auto words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    const auto words = __builtin_convertvector(*reinterpret_cast<const UnalignedH*>(p), VecU);
#endif
    return reinterpret_cast<VecF>(reinterpret_cast<VecU>(words) << 16);
}

INLINE void store(float* p, VecF x) { *reinterpret_cast<UnalignedF*>(p) = x; }

// Round to nearest, ties to even, as torch does; a NaN stays one.
INLINE void store(BFloat16* p, VecF x) {
    const VecU bits = reinterpret_cast<VecU>(x);
    const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const VecU is_number = reinterpret_cast<VecU>(x == x);
    const VecU result = (rounded & is_number) | (0x7fc0 & ~is_number);
    *reinterpret_cast<UnalignedH*>(p) = __builtin_convertvector(result, VecH);
}

INLINE float to_float(float x) { return x; }

INLINE float to_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

INLINE void assign(float& to, float x) { to = x; }

INLINE void assign(BFloat16& to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to.bits = x == x ? static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

// The nearest value of type T, as a float.
template <class T> INLINE float round_to(float x) {
    T rounded;
    assign(rounded, x);
    return to_float(rounded);
}

template <class T> INLINE VecF round_to(VecF x);
template <> INLINE VecF round_to<float>(VecF x) { return x; }
template <> INLINE VecF round_to<BFloat16>(VecF x) {
    const VecU bits = reinterpret_cast<VecU>(x);
    const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    return reinterpret_cast<VecF>(x == x ? rounded : bits);
}

// a * b + c. Where the machine can, by an instruction asked for by name: left to itself the compiler fuses in
// one copy of a kernel and not in another, and then a row's bits would depend on the batch around it.
INLINE VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__) && TANDEM_LANES == 16
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__) && TANDEM_LANES == 8
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// Loads x once: the compiler else loads it again for every product, and there are too few load ports.
INLINE void keep_in_register(VecF& x) {
#if (defined(__AVX512F__) && TANDEM_LANES == 16) || (defined(__AVX2__) && TANDEM_LANES == 8)
    asm("" : "+v"(x));
#else
    (void)x;
#endif
}

INLINE VecF maximum(VecF a, VecF b) { return a > b ? a : b; }

// e^x within 2 ulp; 0 below the smallest normal result, and never infinite: x is cut off at 88.
INLINE VecF exponential(VecF x) {
    const VecF clamped = x > 88.0f ? splat(88.0f) : (x < -87.0f ? splat(-87.0f) : x);
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the sum.
    const float shifter = 12582912.0f;
    const VecF shifted = clamped * 1.44269504088896341f + shifter;
    const VecF n = shifted - shifter;
    // ln 2 in two parts: n times the first is exact.
    const VecF r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    VecF p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    const VecU exponent = (reinterpret_cast<VecU>(shifted) + 127u) << 23;
    return x < -87.0f ? VecF{} : p * reinterpret_cast<VecF>(exponent);
}

// Shuffles with lane numbers computed at compile time -----------------------------------------------------

template <int BLOCK, size_t... LANE>
INLINE VecF low_blocks(VecF a, VecF b, std::index_sequence<LANE...>) {
    return __builtin_shufflevector(a, b, ((LANE & BLOCK) ? LANE - BLOCK + LANES : LANE)...);
}

template <int BLOCK, size_t... LANE>
INLINE VecF high_blocks(VecF a, VecF b, std::index_sequence<LANE...>) {
    return __builtin_shufflevector(a, b, ((LANE & BLOCK) ? LANE + LANES : LANE + BLOCK)...);
}

using AllLanes = std::make_index_sequence<LANES>;

// The sum, or the largest, of all lanes.
template <int BLOCK = LANES / 2> INLINE float sum(VecF x) {
    x += high_blocks<BLOCK>(x, x, AllLanes{});
    if constexpr (BLOCK > 1)
        return sum<BLOCK / 2>(x);
    else
        return x[0];
}

template <int BLOCK = LANES / 2> INLINE float largest(VecF x) {
    x = maximum(high_blocks<BLOCK>(x, x, AllLanes{}), x);
    if constexpr (BLOCK > 1)
        return largest<BLOCK / 2>(x);
    else
        return x[0];
}

// Lane i of the result is the sum of the lanes of x[i]. Overwrites x.
template <int BLOCK = LANES / 2> INLINE VecF sum_each(VecF (&x)[LANES]) {
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK; i++)
        x[i] = low_blocks<BLOCK>(x[i], x[i + BLOCK], AllLanes{}) +
               high_blocks<BLOCK>(x[i], x[i + BLOCK], AllLanes{});
    if constexpr (BLOCK > 1)
        return sum_each<BLOCK / 2>(x);
    else
        return x[0];
}

template <int BLOCK = LANES / 2> INLINE void transpose(VecF (&x)[LANES]) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (i & BLOCK) continue;
        const VecF low = low_blocks<BLOCK>(x[i], x[i + BLOCK], AllLanes{});
        x[i + BLOCK] = high_blocks<BLOCK>(x[i], x[i + BLOCK], AllLanes{});
        x[i] = low;
    }
    if constexpr (BLOCK > 1) transpose<BLOCK / 2>(x);
}

// Scratch memory ------------------------------------------------------------------------------------------

// Memory that a thread keeps between calls, one buffer per SLOT; it only grows. Aligned to cache lines.
template <int SLOT> float* scratch(size_t num_floats) {
    struct Buffer {
        float* data = nullptr;
        size_t capacity = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffer;
    if (num_floats > buffer.capacity) {
        std::free(buffer.data);
        const size_t rounded = (num_floats + 1023) / 1024 * 1024;
        buffer.data = static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float)));
        if (buffer.data == nullptr) {
            std::fprintf(stderr, "engine.ops: no memory for %zu bytes of scratch\n", rounded * 4);
            std::abort();
        }
        buffer.capacity = rounded;
    }
    return buffer.data;
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
template <class T> constexpr T min_of(T a, T b) { return a < b ? a : b; }
template <class T> constexpr T max_of(T a, T b) { return a > b ? a : b; }

// Matrix product out of registers -------------------------------------------------------------------------

constexpr int TILE_COLS = 2 * LANES;
constexpr int TILE_ROWS = LANES == 16 ? 12 : 6;  // accumulators fill 24 of 32, or 12 of 16 registers

// c[ROWS, TILE_COLS] (+)= a[ROWS, depth] @ b[depth, TILE_COLS]; strides count elements between rows.
template <int ROWS>
INLINE void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                          int64_t c_stride, int64_t depth, bool accumulate) {
    VecF sums[ROWS][2] = {};
    for (int64_t k = 0; k < depth; k++) {
        const VecF b0 = load(b + k * b_stride), b1 = load(b + k * b_stride + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const VecF x = splat(a[r * a_stride + k]);
            sums[r][0] = multiply_add(x, b0, sums[r][0]);
            sums[r][1] = multiply_add(x, b1, sums[r][1]);
        }
    }
    // Added at the end: sums of sums lose less than one long sum.
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        float* to = c + r * c_stride;
        store(to, accumulate ? load(to) + sums[r][0] : sums[r][0]);
        store(to + LANES, accumulate ? load(to + LANES) + sums[r][1] : sums[r][1]);
    }
}

template <int ROWS = TILE_ROWS - 1>
INLINE void multiply_last_rows(int64_t rows, const float* a, int64_t a_stride, const float* b,
                               int64_t b_stride, float* c, int64_t c_stride, int64_t depth,
                               bool accumulate) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS)
            multiply_tile<ROWS>(a, a_stride, b, b_stride, c, c_stride, depth, accumulate);
        else
            multiply_last_rows<ROWS - 1>(rows, a, a_stride, b, b_stride, c, c_stride, depth, accumulate);
    }
}

// c[rows, TILE_COLS] (+)= a[rows, depth] @ b[depth, TILE_COLS], for a panel b that fits the L1 cache.
inline void multiply_panel(int64_t rows, const float* a, int64_t a_stride, const float* b,
                                  int64_t b_stride, float* c, int64_t c_stride, int64_t depth,
                                  bool accumulate) {
    int64_t row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
        multiply_tile<TILE_ROWS>(a + row * a_stride, a_stride, b, b_stride, c + row * c_stride, c_stride,
                                 depth, accumulate);
    multiply_last_rows(rows - row, a + row * a_stride, a_stride, b, b_stride, c + row * c_stride, c_stride,
                       depth, accumulate);
}

// to[depth, LANES] = transpose of LANES rows of `depth` elements each; `to` has rows of `to_stride` floats.
template <class T>
INLINE void transpose_rows(const T* const (&rows)[LANES], int64_t depth, float* to, int64_t to_stride) {
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
        VecF block[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) block[i] = load(rows[i] + k);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) store(to + (k + i) * to_stride, block[i]);
    }
    for (; k < depth; k++)
        for (int i = 0; i < LANES; i++) to[k * to_stride + i] = to_float(rows[i][k]);
}
