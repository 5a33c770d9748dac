/* Copies scattered blocks of one mapping into another: a whole pull in one call, so that a caller that lets go of
 * an interpreter's lock does so once. See block_copy.py. */

#include <stdint.h>
#include <string.h>

/* Bytes copied between two looks at the stop flag. */
#define PIECE_BYTES ((int64_t)4 << 20)

/* `pairs` holds 2 * num_pairs block numbers, source and target in turn, all within their mappings. Pairs that
 * continue each other on both sides are copied as one. Returns the bytes copied: all of them, unless *stop was
 * seen to be other than 0. */
int64_t tandem_copy_blocks(char *target, const char *source, const int64_t *pairs, int64_t num_pairs,
                           int64_t block_bytes, const int32_t *stop)
{
    int64_t copied = 0;
    int64_t first = 0;
    while (first < num_pairs) {
        const int64_t *pair = pairs + 2 * first;
        int64_t length = 1;
        while (first + length < num_pairs && pair[2 * length] == pair[0] + length &&
               pair[2 * length + 1] == pair[1] + length)
            length++;
        int64_t end = length * block_bytes;
        for (int64_t at = 0; at < end; at += PIECE_BYTES) {
            int64_t size = end - at < PIECE_BYTES ? end - at : PIECE_BYTES;
            if (__atomic_load_n(stop, __ATOMIC_RELAXED))
                return copied;
            memcpy(target + pair[1] * block_bytes + at, source + pair[0] * block_bytes + at, (size_t)size);
            copied += size;
        }
        first += length;
    }
    return copied;
}
