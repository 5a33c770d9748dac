/* The loops of planes.py, compiled: the same bytes. See there for what they mean. Little-endian machines only. */

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

/* `planes` of `count` bytes each, one behind the other; returns 0 for items of a size that there is not. */
INLINE int32_t split(const void *restrict items, int64_t count, int64_t item_bytes, uint8_t *restrict planes)
{
    if (item_bytes == 2) {
        const uint16_t *restrict from = items;
        uint8_t *restrict low = planes, *restrict high = planes + count;
        for (int64_t i = 0; i < count; i++) {
            uint16_t turned = (uint16_t)(from[i] << 1 | from[i] >> 15);
            low[i] = (uint8_t)turned;
            high[i] = (uint8_t)(turned >> 8);
        }
        return 1;
    }
    if (item_bytes == 4) {
        const uint32_t *restrict from = items;
        uint8_t *restrict first = planes, *restrict second = planes + count, *restrict third = planes + 2 * count,
                *restrict fourth = planes + 3 * count;
        for (int64_t i = 0; i < count; i++) {
            uint32_t number = from[i];
            first[i] = (uint8_t)number;
            second[i] = (uint8_t)(number >> 8);
            third[i] = (uint8_t)(number >> 16 << 1 | number >> 31);
            fourth[i] = (uint8_t)(number >> 23);
        }
        return 1;
    }
    return 0;
}

INLINE int32_t merge(const uint8_t *const *restrict planes, int64_t count, int64_t item_bytes, void *restrict items)
{
    if (item_bytes == 2) {
        const uint8_t *restrict low = planes[0], *restrict high = planes[1];
        uint16_t *restrict into = items;
        for (int64_t i = 0; i < count; i++) {
            uint16_t turned = (uint16_t)(high[i] << 8 | low[i]);
            into[i] = (uint16_t)(turned >> 1 | turned << 15);
        }
        return 1;
    }
    if (item_bytes == 4) {
        const uint8_t *restrict first = planes[0], *restrict second = planes[1], *restrict third = planes[2],
                      *restrict fourth = planes[3];
        uint32_t *restrict into = items;
        for (int64_t i = 0; i < count; i++) {
            uint32_t turned = (uint32_t)fourth[i] << 8 | third[i];
            into[i] = turned << 31 | turned >> 1 << 16 | (uint32_t)second[i] << 8 | first[i];
        }
        return 1;
    }
    return 0;
}

#ifdef __x86_64__
__attribute__((target("avx2"))) static int32_t split_avx2(const void *items, int64_t count, int64_t item_bytes,
                                                          uint8_t *planes)
{
    return split(items, count, item_bytes, planes);
}

__attribute__((target("avx2"))) static int32_t merge_avx2(const uint8_t *const *planes, int64_t count,
                                                          int64_t item_bytes, void *items)
{
    return merge(planes, count, item_bytes, items);
}
#endif

int32_t tandem_split_planes(const void *items, int64_t count, int64_t item_bytes, uint8_t *planes)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2"))
        return split_avx2(items, count, item_bytes, planes);
#endif
    return split(items, count, item_bytes, planes);
}

int32_t tandem_merge_planes(const uint8_t *const *planes, int64_t count, int64_t item_bytes, void *items)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2"))
        return merge_avx2(planes, count, item_bytes, items);
#endif
    return merge(planes, count, item_bytes, items);
}
