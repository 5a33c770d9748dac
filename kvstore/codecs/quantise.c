/* The loops of quantise.py, compiled: the same codes, scales, zeros and numbers to the bit. See there for what they
 * mean. Built without contraction to fused operations, which would round once where numpy rounds twice. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* All of it is compiled into the functions at the end: once for any machine, and once for those with AVX2. */
#define INLINE static inline __attribute__((always_inline))

/* Sizes of a block: rows are kv heads times layers, each with keys, then values, `[tokens, head_dim]`. */
struct block {
    int64_t rows, tokens, head_dim, group_channels, bits, is_bfloat16;
};

#define ZERO_STEPS 4.0f
#define MIN_SCALE 0x1p-100f
#define MAX_SCALE 0x1p100f
#define BELOW_SIX ((UINT32_C(1) << 18) - 1)

INLINE float number_of(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

INLINE uint32_t bits_of(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

/* Sets scales and zeros of groups with these ranges; 0 where one has none. */
INLINE int ranges_to_scales(const float *restrict lows, const float *restrict highs, float span_steps,
                                   float *restrict scales, int16_t *restrict zeros, int64_t count)
{
    float widest = 0;
#pragma omp simd reduction(max : widest)
    for (int64_t g = 0; g < count; g++) {
        float wide = (highs[g] - lows[g]) / span_steps;
        float far = fabsf(lows[g]) * (float)(4.0 / 32000.0);
        wide = wide > far ? wide : far;
        wide = wide > MIN_SCALE ? wide : MIN_SCALE;
        widest = wide > widest ? wide : widest;
        scales[g] = number_of((bits_of(wide) + BELOW_SIX) & ~BELOW_SIX);
    }
    if (!(widest <= MAX_SCALE))
        return 0;
    for (int64_t g = 0; g < count; g++)
        zeros[g] = (int16_t)(int32_t)floorf(lows[g] * (ZERO_STEPS / scales[g]));
    return 1;
}

INLINE float zero_of(float scale, int16_t zero)
{
    return (float)zero * (scale * (1 / ZERO_STEPS));
}

INLINE void pack(const uint8_t *restrict codes, uint8_t *restrict packed, int64_t head_dim, int64_t bits)
{
    if (bits == 8) {
        memcpy(packed, codes, (size_t)head_dim);
        return;
    }
    int64_t half = head_dim / 2;
    for (int64_t e = 0; e < half; e++)
        packed[e] = (uint8_t)(codes[e] | codes[e + half] << 4);
}

INLINE void unpack(const uint8_t *restrict packed, uint8_t *restrict codes, int64_t head_dim, int64_t bits)
{
    if (bits == 8) {
        memcpy(codes, packed, (size_t)head_dim);
        return;
    }
    int64_t half = head_dim / 2;
    for (int64_t e = 0; e < half; e++) {
        codes[e] = packed[e] & 15;
        codes[e + half] = packed[e] >> 4;
    }
}

/* All are finite: in which order they are compared does not matter. */
INLINE void range_of(const float *restrict numbers, int64_t count, float *restrict lowest,
                            float *restrict highest)
{
    float low = numbers[0], high = numbers[0];
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t e = 0; e < count; e++) {
        low = numbers[e] < low ? numbers[e] : low;
        high = numbers[e] > high ? numbers[e] : high;
    }
    *lowest = low;
    *highest = high;
}

/* Codes of numbers with one zero and one over the scale for each of them. */
INLINE void steps_of(const float *restrict numbers, const float *restrict zeros, const float *restrict inverses,
                            uint8_t *restrict codes, int64_t count)
{
    for (int64_t e = 0; e < count; e++)
        codes[e] = (uint8_t)(int32_t)((numbers[e] - zeros[e]) * inverses[e] + 0.5f);
}

/* The same with one for all. */
INLINE void steps_of_group(const float *restrict numbers, float zero, float inverse, uint8_t *restrict codes,
                                  int64_t count)
{
    for (int64_t e = 0; e < count; e++)
        codes[e] = (uint8_t)(int32_t)((numbers[e] - zero) * inverse + 0.5f);
}

INLINE void numbers_of(const uint8_t *restrict codes, const float *restrict scales, const float *restrict zeros,
                              float *restrict numbers, int64_t count)
{
    for (int64_t e = 0; e < count; e++)
        numbers[e] = (float)codes[e] * scales[e] + zeros[e];
}

INLINE void numbers_of_group(const uint8_t *restrict codes, float scale, float zero, float *restrict numbers,
                                    int64_t count)
{
    for (int64_t e = 0; e < count; e++)
        numbers[e] = (float)codes[e] * scale + zero;
}

/* Widens one side of a row; 0 where a number is not finite. */
INLINE int widen(const struct block *sizes, const char *restrict block, int64_t side, float *restrict numbers)
{
    int64_t count = sizes->tokens * sizes->head_dim;
    uint32_t worst = 0;
    if (sizes->is_bfloat16) {
        const uint16_t *stored = (const uint16_t *)block + side * count;
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits = (uint32_t)stored[i] << 16, size = bits & UINT32_C(0x7fffffff);
            worst = size > worst ? size : worst;
            numbers[i] = number_of(bits);
        }
    } else {
        const float *stored = (const float *)block + side * count;
        for (int64_t i = 0; i < count; i++) {
            uint32_t size = bits_of(stored[i]) & UINT32_C(0x7fffffff);
            worst = size > worst ? size : worst;
            numbers[i] = stored[i];
        }
    }
    return worst < UINT32_C(0x7f800000);
}

INLINE void narrow(const struct block *sizes, char *restrict block, int64_t at, const float *restrict numbers)
{
    if (!sizes->is_bfloat16) {
        memcpy((float *)block + at, numbers, (size_t)sizes->head_dim * 4);
        return;
    }
    uint16_t *stored = (uint16_t *)block + at;
    for (int64_t e = 0; e < sizes->head_dim; e++)
        stored[e] = (uint16_t)((bits_of(numbers[e]) + UINT32_C(0x8000)) >> 16);
}

/* `numbers` has room for one side of a row, `line` for three heads and two numbers for each
 * group of a row. Scales and zeros: of all keys, then of all values. Returns 1, or 0 where the block has no finite ranges. */
INLINE int32_t quantise(const struct block *restrict sizes, const char *restrict block, uint8_t *restrict keys,
                        uint8_t *restrict values, float *restrict scales, int16_t *restrict zeros,
                        float *restrict numbers, float *restrict line)
{
    int64_t head_dim = sizes->head_dim, tokens = sizes->tokens, channels = sizes->group_channels;
    int64_t packed_dim = head_dim * sizes->bits / 8, side_bytes = tokens * head_dim * (sizes->is_bfloat16 ? 2 : 4);
    float span_steps = (float)((1 << sizes->bits) - 1) - 1 / ZERO_STEPS;
    float *value_scales = scales + sizes->rows * head_dim;
    int16_t *value_zeros = zeros + sizes->rows * head_dim;
    int64_t num_groups = tokens * (head_dim / channels);
    float *low = line, *high = line + head_dim, *group_lows = line + 2 * head_dim, *group_highs = group_lows + num_groups;
    uint8_t *codes = (uint8_t *)(group_highs + num_groups);
    for (int64_t row = 0; row < sizes->rows; row++, block += 2 * side_bytes) {
        if (!widen(sizes, block, 0, numbers))
            return 0;
        memcpy(low, numbers, (size_t)head_dim * 4);
        memcpy(high, numbers, (size_t)head_dim * 4);
        for (int64_t t = 1; t < tokens; t++)
            for (int64_t e = 0; e < head_dim; e++) {
                float number = numbers[t * head_dim + e];
                low[e] = number < low[e] ? number : low[e];
                high[e] = number > high[e] ? number : high[e];
            }
        if (!ranges_to_scales(low, high, span_steps, scales, zeros, head_dim))
            return 0;
        for (int64_t e = 0; e < head_dim; e++) {
            low[e] = zero_of(scales[e], zeros[e]);
            high[e] = 1.0f / scales[e];
        }
        for (int64_t t = 0; t < tokens; t++, keys += packed_dim) {
            steps_of(numbers + t * head_dim, low, high, codes, head_dim);
            pack(codes, keys, head_dim, sizes->bits);
        }
        scales += head_dim;
        zeros += head_dim;
        if (!widen(sizes, block, 1, numbers))
            return 0;
        for (int64_t g = 0; g < num_groups; g++)
            range_of(numbers + g * channels, channels, group_lows + g, group_highs + g);
        if (!ranges_to_scales(group_lows, group_highs, span_steps, value_scales, value_zeros, num_groups))
            return 0;
        for (int64_t t = 0; t < tokens; t++, values += packed_dim) {
            for (int64_t first = 0; first < head_dim; first += channels) {
                float zero = zero_of(*value_scales, *value_zeros++), inverse = 1.0f / *value_scales++;
                steps_of_group(numbers + t * head_dim + first, zero, inverse, codes + first, channels);
            }
            pack(codes, values, head_dim, sizes->bits);
        }
    }
    return 1;
}

/* `line` has room for three heads. */
INLINE void dequantise(const struct block *restrict sizes, char *restrict block, const uint8_t *restrict keys,
                       const uint8_t *restrict values, const float *restrict scales, const int16_t *restrict zeros,
                       float *restrict line)
{
    int64_t head_dim = sizes->head_dim, tokens = sizes->tokens, channels = sizes->group_channels;
    int64_t packed_dim = head_dim * sizes->bits / 8, at = 0;
    const float *value_scales = scales + sizes->rows * head_dim;
    const int16_t *value_zeros = zeros + sizes->rows * head_dim;
    float *offsets = line, *numbers = line + head_dim;
    uint8_t *codes = (uint8_t *)(line + 2 * head_dim);
    for (int64_t row = 0; row < sizes->rows; row++) {
        for (int64_t e = 0; e < head_dim; e++)
            offsets[e] = zero_of(scales[e], zeros[e]);
        for (int64_t t = 0; t < tokens; t++, keys += packed_dim, at += head_dim) {
            unpack(keys, codes, head_dim, sizes->bits);
            numbers_of(codes, scales, offsets, numbers, head_dim);
            narrow(sizes, block, at, numbers);
        }
        scales += head_dim;
        zeros += head_dim;
        for (int64_t t = 0; t < tokens; t++, values += packed_dim, at += head_dim) {
            unpack(values, codes, head_dim, sizes->bits);
            for (int64_t first = 0; first < head_dim; first += channels) {
                float scale = *value_scales++, zero = zero_of(scale, *value_zeros++);
                numbers_of_group(codes + first, scale, zero, numbers + first, channels);
            }
            narrow(sizes, block, at, numbers);
        }
    }
}

#ifdef __x86_64__
__attribute__((target("avx2"))) static int32_t quantise_avx2(const struct block *sizes, const char *block,
                                                             uint8_t *keys, uint8_t *values, float *scales,
                                                             int16_t *zeros, float *numbers, float *line)
{
    return quantise(sizes, block, keys, values, scales, zeros, numbers, line);
}

__attribute__((target("avx2"))) static void dequantise_avx2(const struct block *sizes, char *block,
                                                            const uint8_t *keys, const uint8_t *values,
                                                            const float *scales, const int16_t *zeros, float *line)
{
    dequantise(sizes, block, keys, values, scales, zeros, line);
}
#endif

int32_t tandem_quantise(const struct block *sizes, const char *block, uint8_t *keys, uint8_t *values, float *scales,
                        int16_t *zeros, float *numbers, float *line)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2"))
        return quantise_avx2(sizes, block, keys, values, scales, zeros, numbers, line);
#endif
    return quantise(sizes, block, keys, values, scales, zeros, numbers, line);
}

void tandem_dequantise(const struct block *sizes, char *block, const uint8_t *keys, const uint8_t *values,
                       const float *scales, const int16_t *zeros, float *line)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2")) {
        dequantise_avx2(sizes, block, keys, values, scales, zeros, line);
        return;
    }
#endif
    dequantise(sizes, block, keys, values, scales, zeros, line);
}
