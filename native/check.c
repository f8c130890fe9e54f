/* Slots before they are given to a decoder: sizes, checksums, padding, and the frames of zstd
 * (SPEC.md 5 and 6). */
#include "core.h"

/* Returns 0 where the slots of some chunks do not fill their memory exactly. */
int slots_fill_exactly(const uint8_t *records, size_t chunks, size_t slots_bytes)
{
    uint64_t sum = 0;
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        uint32_t stored_bytes = load32(record_of(records, chunk));
        if (stored_bytes == 0)
            return 0;
        sum += slot_bytes(stored_bytes); /* chunks and sizes have 32 bits at most: no overflow */
    }
    return sum == slots_bytes;
}

int slot_is_sound(const uint8_t *slot, const uint8_t *record)
{
    size_t stored_bytes = load32(record), size = slot_bytes(stored_bytes);
    if (xxh3_of_slot(slot, size) != load64(record + 8))
        return 0;
    for (size_t at = stored_bytes; at < size; at++)
        if (slot[at])
            return 0;
    return 1;
}

#define ZSTD_MAGIC 0xFD2FB528u
#define ZSTD_MOST_WINDOW ((uint64_t)1 << 23)

int zstd_is_plain(const uint8_t *frame, size_t size, uint64_t raw_bytes)
{
    static const int size_bytes[] = {0, 2, 4, 8};
    if (size < 6 || load32(frame) != ZSTD_MAGIC)
        return 0;
    int descriptor = frame[4], single = descriptor >> 5 & 1, bytes = size_bytes[descriptor >> 6];
    size_t at = 5;
    uint64_t window = raw_bytes, declared = 0;
    if (descriptor & 0x1f) /* a dictionary, a checksum, or a bit that means nothing yet */
        return 0;
    if (!single) {
        int exponent = frame[at] >> 3, eighths = frame[at] & 7;
        at++;
        window = ((uint64_t)8 + (uint64_t)eighths) << (exponent + 7);
    } else if (bytes == 0) {
        bytes = 1;
    }
    if (bytes == 0 || window > ZSTD_MOST_WINDOW || size - at < (size_t)bytes)
        return 0;
    for (int byte = 0; byte < bytes; byte++)
        declared |= (uint64_t)frame[at + (size_t)byte] << 8 * byte;
    if (declared + (bytes == 2 ? 256 : 0) != raw_bytes)
        return 0;
    at += (size_t)bytes;
    for (int last = 0; !last;) {
        if (size - at < 3)
            return 0;
        uint32_t block = frame[at] | (uint32_t)frame[at + 1] << 8 | (uint32_t)frame[at + 2] << 16;
        size_t content = (block >> 1 & 3) == 1 ? 1 : block >> 3;
        last = block & 1;
        at += 3;
        if (size - at < content)
            return 0;
        at += content;
    }
    return at == size;
}

int64_t check_slots(const uint8_t *slots, size_t slots_bytes, const uint8_t *records,
                    const int64_t *raw_bytes, size_t chunks)
{
    if (chunks > UINT32_MAX || !slots_fill_exactly(records, chunks, slots_bytes))
        return -2;
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        const uint8_t *record = record_of(records, chunk);
        if (!slot_is_sound(slots, record))
            return (int64_t)chunk;
        if (record[4] == CODEC_ZSTD &&
            !zstd_is_plain(slots, load32(record), (uint64_t)raw_bytes[chunk]))
            return (int64_t)chunk;
        slots += slot_bytes(load32(record));
    }
    return -1;
}
