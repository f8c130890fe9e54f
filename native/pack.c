/* Packing a block: the symbols of many chunks -> slots and records (SPEC.md 5 and 6). */
#include "core.h"

#include <limits.h>

/* A chunk is stored coded if that saves 1/128 of it: less is not worth the decoding. */
#define LEAST_GAIN 128
/* Beyond that many symbols only every 17th is counted for the estimate of their entropy. */
#ifndef COUNTED_EXACTLY /* fuzzing sets smaller ones, so that short inputs come beyond */
#define COUNTED_EXACTLY (1 << 14)
#endif
#define SAMPLE_STRIDE 17
#define COST_BITS 16
#define MOST_CHUNK_BYTES ((int64_t)1 << 30)

static int shrinks(size_t stored_bytes, size_t raw_bytes)
{
    return stored_bytes < raw_bytes - raw_bytes / LEAST_GAIN;
}

void count_symbols(const uint8_t *symbols, size_t size, size_t stride, uint32_t counts[256])
{
    /* Four counters a symbol: equal neighbours would wait for each other's addition. */
    uint32_t part[4][256];
    size_t left = size ? (size - 1) / stride + 1 : 0, at = 0;
    memset(part, 0, sizeof part);
    for (; left >= 4; left -= 4, at += 4 * stride)
        for (size_t way = 0; way < 4; way++)
            part[way][symbols[at + way * stride]]++;
    for (; left > 0; left--, at += stride)
        part[0][symbols[at]]++;
    for (int symbol = 0; symbol < 256; symbol++)
        counts[symbol] = part[0][symbol] + part[1][symbol] + part[2][symbol] + part[3][symbol];
}

static size_t pack_table(const rans_fitted *table, uint8_t *packed)
{
    size_t size = RANS_HEAD_BYTES;
    memset(packed, 0, RANS_HEAD_BYTES);
    packed[0] = (uint8_t)table->precision;
    for (int symbol = 0; symbol < 256; symbol++) {
        uint32_t value = table->frequency[symbol];
        if (!value--)
            continue;
        packed[1 + symbol / 8] |= (uint8_t)(1 << symbol % 8);
        packed[size++] = (uint8_t)(value > 127 ? 128 | (value & 127) : value);
        if (value > 127)
            packed[size++] = (uint8_t)(value >> 7);
    }
    return size;
}

/* Stored bytes that rans_fit.py expects of a chunk. */
static int64_t expected_bytes(const uint32_t counts[256], const rans_fitted *table,
                              const int64_t *log2_table)
{
    int64_t cost = 0;
    for (int symbol = 0; symbol < 256; symbol++)
        if (counts[symbol])
            cost += counts[symbol] * (((int64_t)table->precision << COST_BITS) -
                                      log2_table[table->frequency[symbol]]);
    return STATE_BYTES + ((cost >> COST_BITS) + 7) / 8;
}

size_t tables_of(const packing *job)
{
    return (job->chunks + job->group - 1) / job->group * job->places;
}

static size_t table_of(const packing *job, size_t chunk)
{
    return chunk / job->group * job->places + chunk % job->places;
}

/* Fits all tables; -1 where the counts forbid it. */
static int fit_tables(const packing *job)
{
    for (size_t number = 0; number < tables_of(job); number++) {
        int64_t sum[256] = {0};
        rans_fitted *table = &job->fitted[number];
        size_t begin = number / job->places * job->group, end = begin + job->group;
        end = end < job->chunks ? end : job->chunks;
        for (size_t chunk = begin + number % job->places; chunk < end; chunk += job->places)
            for (int symbol = 0; symbol < 256; symbol++)
                sum[symbol] += job->counts[256 * chunk + (size_t)symbol];
        table->precision = rans_fit(sum, job->log2_table, table->frequency);
        if (!table->precision)
            return -1;
    }
    return 0;
}

/* Codes a chunk into the end of the scratch memory; returns the size, 0 where it would not shrink,
 * -1 where the table does not hold its symbols. */
static int64_t code_chunk(const packing *job, size_t chunk, const uint8_t *symbols,
                          rans_coder *coder, size_t *prepared)
{
    size_t raw_bytes = (size_t)job->raw_bytes[chunk], number = table_of(job, chunk);
    const rans_fitted *table = &job->fitted[number];
    /* Decided by the expected size: a chunk that would stay raw is never coded. */
    if (!shrinks((size_t)expected_bytes(job->counts + 256 * chunk, table, job->log2_table),
                 raw_bytes))
        return 0;
    if (*prepared != number && rans_build_coder(table->frequency, table->precision, coder))
        return -1;
    *prepared = number;
    size_t size = rans_encode(symbols, raw_bytes, coder, job->scratch);
    return size ? (int64_t)size : -1;
}

static uint8_t *put_slot(uint8_t *slot, uint8_t *record, const uint8_t *bytes, size_t size,
                         int codec, int low_bits)
{
    size_t room = slot_bytes(size);
    memcpy(slot, bytes, size);
    memset(slot + size, 0, room - size);
    uint64_t hash = xxh3_of_slot(slot, room);
    store32(record, (uint32_t)size);
    record[4] = (uint8_t)codec;
    record[5] = (uint8_t)low_bits;
    record[6] = record[7] = 0;
    store32(record + 8, (uint32_t)hash);
    store32(record + 12, (uint32_t)(hash >> 32));
    return slot + room;
}

static int sizes_fit(const packing *job)
{
    size_t sum = 0, room = 0, longest = 0;
    if (!job->chunks || job->chunks > INT_MAX || !job->places || job->chunks % job->places ||
        !job->group || job->group % job->places)
        return 0;
    for (size_t chunk = 0; chunk < job->chunks; chunk++) {
        int64_t size = job->raw_bytes[chunk];
        if (size < 1 || size > MOST_CHUNK_BYTES || sum > job->symbols_bytes)
            return 0;
        sum += (size_t)size;
        room += slot_bytes((size_t)size);
        longest = (size_t)size > longest ? (size_t)size : longest;
    }
    if (sum != job->symbols_bytes || room > job->slots_bytes)
        return 0;
    return job->codec == CODEC_ZSTD ||
           (job->codec == CODEC_RANS && job->scratch_bytes >= rans_encode_bound(longest));
}

int64_t pack_chunks(const packing *job)
{
    rans_coder coder;
    size_t prepared = SIZE_MAX;
    const uint8_t *symbols = job->symbols;
    uint8_t *slot = job->slots;
    if (!sizes_fit(job))
        return -1;
    for (size_t chunk = 0; chunk < job->chunks; symbols += job->raw_bytes[chunk++]) {
        size_t size = (size_t)job->raw_bytes[chunk];
        int sampled = job->codec == CODEC_ZSTD && size > COUNTED_EXACTLY;
        count_symbols(symbols, size, sampled ? SAMPLE_STRIDE : 1, job->counts + 256 * chunk);
    }
    if (job->codec == CODEC_RANS) {
        if (fit_tables(job))
            return -1;
        memset(job->table_bytes, 0, tables_of(job) * sizeof *job->table_bytes);
    }
    symbols = job->symbols;
    for (size_t chunk = 0; chunk < job->chunks; symbols += job->raw_bytes[chunk++]) {
        size_t raw_bytes = (size_t)job->raw_bytes[chunk], number = table_of(job, chunk);
        uint8_t *record = job->records + RECORD_BYTES * chunk;
        int low_bits = job->low_bits ? job->low_bits[chunk] : 0;
        const uint8_t *stored = NULL;
        int64_t size = 0;
        if (job->codec == CODEC_ZSTD) {
            stored = job->frames[chunk];
            size = stored ? (int64_t)job->frame_bytes[chunk] : 0;
        } else {
            size = code_chunk(job, chunk, symbols, &coder, &prepared);
            if (size < 0)
                return -1;
            stored = job->scratch + rans_encode_bound(raw_bytes) - size;
        }
        if (!size || !shrinks((size_t)size, raw_bytes)) {
            slot = put_slot(slot, record, symbols, raw_bytes, CODEC_RAW, low_bits);
            continue;
        }
        slot = put_slot(slot, record, stored, (size_t)size, job->codec, low_bits);
        if (job->codec == CODEC_RANS && !job->table_bytes[number])
            job->table_bytes[number] = (uint16_t)pack_table(
                &job->fitted[number], job->tables + RANS_MOST_TABLE_BYTES * number);
    }
    return slot - job->slots;
}

/* ---- int8 with one scale a row ---- */

#ifndef PIECE
#define PIECE 4096
#endif

static const uint32_t infinity_of[] = {
    [TO_BF16] = 0x7f80, [TO_F16] = 0x7c00, [TO_F32] = 0x7f800000};

static float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The value of a finite half without its sign: the exponent's bias is made up for by the factor. */
static float half_size(uint32_t bits)
{
    return float_of((bits & 0x7fff) << 13) * 0x1p112f;
}

/* Quantizes a row of halves piece by piece, as float32; returns the bits of the largest error. */
static uint32_t quantize_halves(const uint16_t *words, size_t cols, float scale, int8_t *codes)
{
    float piece[PIECE];
    uint32_t most = 0;
    for (size_t begin = 0; begin < cols; begin += PIECE) {
        size_t count = cols - begin < PIECE ? cols - begin : PIECE;
        for (size_t i = 0; i < count; i++) {
            float size = half_size(words[begin + i]);
            piece[i] = words[begin + i] & 0x8000 ? -size : size;
        }
        uint32_t error = kernels()->quantize(piece, 4, count, scale, NULL, codes + begin);
        most = error > most ? error : most;
    }
    return most;
}

int quantize_rows(const void *words, int type, size_t rows, size_t cols, float *absmax,
                  int8_t *codes, float *worst)
{
    static const float LARGEST_SCALE = 0x1.020406p+121f, LEAST_SCALE = 0x1p-126f;
    int itemsize = type == TO_F32 ? 4 : 2, tiny = 0;
    *worst = 0;
    for (size_t row = 0; row < rows; row++, codes += cols) {
        const void *at = (const uint8_t *)words + row * cols * (size_t)itemsize;
        uint32_t largest = kernels()->largest(at, itemsize, cols);
        if (largest >= infinity_of[type])
            return ROWS_NOT_FINITE;
        absmax[row] = type == TO_F32    ? float_of(largest)
                      : type == TO_BF16 ? float_of(largest << 16)
                                        : half_size(largest);
        float scale = absmax[row] / 127.0f;
        tiny |= absmax[row] > 0 && scale < LEAST_SCALE;
        if (tiny)
            continue; /* a row that is not finite may follow: that is the graver fault */
        scale = absmax[row] == 0 ? 1.0f : scale < LARGEST_SCALE ? scale : LARGEST_SCALE;
        uint32_t bits = type == TO_F16
                            ? quantize_halves(at, cols, scale, codes)
                            : kernels()->quantize(at, itemsize, cols, scale, NULL, codes);
        float error = float_of(bits) * scale;
        *worst = error > *worst ? error : *worst;
    }
    return tiny ? ROWS_TINY : ROWS_FINE;
}

void split_tiles(const uint8_t *elements, int itemsize, int rotate, size_t count, size_t tile,
                 uint8_t *symbols)
{
    for (size_t begin = 0; begin < count; begin += tile) {
        size_t part = count - begin < tile ? count - begin : tile;
        uint8_t *plane[MAX_PLANES];
        for (int number = 0; number < itemsize; number++)
            plane[number] = symbols + (size_t)itemsize * begin + (size_t)number * part;
        kernels()->split(elements + (size_t)itemsize * begin, itemsize, rotate, part, plane);
    }
}
