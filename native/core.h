/* The native core of codecllm: what the loader and the converter do for each chunk, without the
 * interpreter.
 *
 * Nothing in these files but module.c knows Python. Functions trust no size that comes from
 * outside: each one that reads or writes memory is told how much of it there is.
 */
#ifndef CODECLLM_CORE_H
#define CODECLLM_CORE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 32
#define LOWER 65536u
#define STATE_BYTES (4 * LANES)
#define MIN_PRECISION 12
#define MAX_PRECISION 14
#define RANS_HEAD_BYTES 33
#define RANS_MOST_TABLE_BYTES (RANS_HEAD_BYTES + 2 * 256)
#define SLOT_ALIGNMENT 16
#define RECORD_BYTES 16
#define MAX_PLANES 8

enum { CODEC_RAW = 0, CODEC_ZSTD = 1, CODEC_RANS = 2 };

static inline uint16_t load16(const uint8_t *at)
{
    return (uint16_t)(at[0] | at[1] << 8);
}

static inline uint32_t load32(const uint8_t *at)
{
    return load16(at) | (uint32_t)load16(at + 2) << 16;
}

static inline uint64_t load64(const uint8_t *at)
{
    return load32(at) | (uint64_t)load32(at + 4) << 32;
}

static inline void store16(uint8_t *at, uint16_t value)
{
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
}

static inline void store32(uint8_t *at, uint32_t value)
{
    store16(at, (uint16_t)value);
    store16(at + 2, (uint16_t)(value >> 16));
}

static inline size_t slot_bytes(size_t stored_bytes)
{
    return (stored_bytes + SLOT_ALIGNMENT - 1) / SLOT_ALIGNMENT * SLOT_ALIGNMENT;
}

static inline const uint8_t *record_of(const uint8_t *records, size_t chunk)
{
    return records + chunk * RECORD_BYTES;
}

/* ---- rANS (SPEC.md 6.1) ---- */

typedef struct {
    int precision;
    uint16_t frequency[256];
    /* One entry a slot. Precision 12: symbol << 24 | (frequency - 1) << 12 | (slot - start).
     * Others: frequency | (slot - start) << 16, and the symbol in `symbol`; vector code reads four
     * bytes from there, hence the tail. */
    uint32_t entry[1 << MAX_PRECISION];
    uint8_t symbol[(1 << MAX_PRECISION) + 4];
} rans_table;

/* Fill a table; 0, or -1 where SPEC.md 6.1 forbids it. */
int rans_parse_table(const uint8_t *packed, size_t size, rans_table *table);
int rans_build_table(const uint16_t frequency[256], int precision, rans_table *table);

/* Decodes exactly raw_bytes symbols; 0, or -1 where the bytes are not what an encoder makes. */
int rans_decode(const uint8_t *stored, size_t stored_bytes, const rans_table *table,
                uint8_t *symbols, size_t raw_bytes);

typedef struct {
    const uint8_t *stored;
    size_t stored_bytes;
    uint8_t *symbols;
    size_t raw_bytes;
} rans_chunk;

/* Decodes two chunks of one table side by side: a step waits for its look-ups, which those of the
 * other chunk fill. */
int rans_decode_pair(const rans_chunk chunk[2], const rans_table *table);

typedef struct {
    uint64_t reciprocal;
    uint32_t limit; /* states from there on emit a word; as state >> (32 - precision) */
    uint32_t complement;
    uint32_t bias;
} rans_coding;

typedef struct {
    int precision;
    rans_coding coding[256];
    uint32_t pair[256]; /* frequency | start << 16 */
} rans_coder;

/* Prepares encoding; 0, or -1 where the frequencies do not add up. */
int rans_build_coder(const uint16_t frequency[256], int precision, rans_coder *coder);

/* Encodes one symbol of a lane to the bytes before `at`; returns where the words begin then. */
static inline uint8_t *rans_encode_one(uint32_t *state, const rans_coding *code, int precision,
                                       uint8_t *at)
{
    /* The word is written in any case and stays only where it was due: a branch would be guessed
     * wrong. */
    uint32_t now = *state, due = now >> (32 - precision) >= code->limit, quotient;
    store16(at - 2, (uint16_t)now);
    now >>= 16 * due;
#ifdef __SIZEOF_INT128__
    quotient = (uint32_t)((unsigned __int128)now * code->reciprocal >> 64);
#else
    quotient = code->limit == 1 ? now - 1 : now / code->limit;
#endif
    *state = now + code->bias + quotient * code->complement;
    return at - 2 * due;
}

/* Most bytes that rans_encode writes. */
size_t rans_encode_bound(size_t raw_bytes);

/* Encodes into the end of a buffer of rans_encode_bound bytes; returns the size, 0 for a symbol
 * without frequency. */
size_t rans_encode(const uint8_t *symbols, size_t raw_bytes, const rans_coder *coder,
                   uint8_t *buffer);

/* Fits frequencies to counts exactly as rans_fit.py does. log2_table: rint(2^16 * log2(n)) for n up
 * to 2^14 + 1. Returns the precision, or 0 where nothing is counted or a count is negative or too
 * large. */
int rans_fit(const int64_t counts[256], const int64_t *log2_table, uint16_t frequency[256]);

typedef struct {
    int precision;
    uint16_t frequency[256];
} rans_fitted;

/* ---- xxh3-64
 *
 */

/* XXH3-64 with seed 0 of `size` bytes, a multiple of 16 that is not 0. */
uint64_t xxh3_of_slot(const uint8_t *data, size_t size);

/* ---- kernels: the same code for each instruction set ---- */

typedef struct {
    uint32_t state[LANES];
    const uint8_t *words;
    size_t left; /* words */
} rans_lanes;

enum { TO_BF16, TO_F16, TO_F32, TO_I8, TO_I16 };

typedef struct {
    const char *name;
    /* Decodes whole steps while at least 32 words are left; returns how many of `steps`. */
    size_t (*rans_steps)(rans_lanes *lanes, const rans_table *table, uint8_t *out, size_t steps);
    /* The same for two chunks at once, or NULL where that gains nothing. */
    size_t (*rans_pair_steps)(rans_lanes lanes[2], const rans_table *table, uint8_t *const out[2],
                              size_t steps);
    /* Encodes whole steps, the last one first, to the bytes before `at`; returns where the words
     * begin then, NULL for a symbol without frequency. */
    uint8_t *(*rans_encode_steps)(uint32_t state[LANES], const uint8_t *symbols, size_t steps,
                                  const rans_coder *coder, uint8_t *at);
    /* Adds `stripes` stripes of 64 bytes to the accumulators; `secret` moves by 8 bytes with each.
     */
    void (*xxh3_stripes)(uint64_t acc[8], const uint8_t *data, const uint8_t *secret,
                         size_t stripes);
    /* Planes -> elements: `planes` is 1, 2, 4 or 8, plane 0 the most significant. */
    void (*join)(const uint8_t *const *plane, int planes, int rotate, size_t count, void *out);
    void (*split)(const void *elements, int planes, int rotate, size_t count,
                  uint8_t *const *plane);
    /* out = round(fl32(code * step)); step = fl32(scale * factor[i]), or scale where factor is
     * NULL. */
    void (*dequantize8)(const int8_t *code, size_t count, float scale, const float *factor,
                        int target, void *out);
    void (*dequantize16)(const int16_t *code, size_t count, float scale, const float *factor,
                         int target, void *out);
    void (*widen)(const int8_t *low, const int8_t *high, int low_bits, size_t count, int16_t *code);
    int (*has_lowest)(const int8_t *code, size_t count); /* whether some code is -128 */
    uint32_t (*largest)(const void *words, int itemsize,
                        size_t count); /* of the words without their top bit */
    /* code = rint(fl32(weight / step)); returns the bits of the largest |quotient - code| (factor
     * NULL), or of the largest fl32(|quotient - code| * factor[i]). Steps are `scale`, or
     * factor[i]. */
    uint32_t (*quantize)(const void *words, int itemsize, size_t count, float scale,
                         const float *factor, int8_t *code);
} kernel_set;

extern const kernel_set kernels_portable;
extern const kernel_set kernels_avx2;
extern const kernel_set kernels_avx512;
extern const kernel_set kernels_neon;

/* The set in use: the best that this machine has, until kernels_use names another one. */
const kernel_set *kernels(void);
/* Number and sets that this machine can run, the best first. `portable` is one of them everywhere.
 */
size_t kernels_supported(const kernel_set *sets[3]);
int kernels_use(const char *name);

/* ---- a run of tiles ---- */

enum { FINISH_JOIN, FINISH_DEQUANTIZE };

typedef struct {
    /* The slots of the chunks of tiles [first_tile, last_tile), and their records (SPEC.md 5). */
    const uint8_t *slots;
    size_t slots_bytes;
    const uint8_t *records;
    /* Symbols of chunks that the caller decoded (codec zstd), NULL for others; and their sizes. */
    const uint8_t *const *given;
    const size_t *given_bytes;
    int checked; /* checksums and padding were checked before */

    uint64_t rows, cols, tile_rows, tile_cols, first_tile, last_tile;
    int planes;

    /* X_tables: packed tables, their offsets (tables + 1 of them), groups in tiles. */
    const uint8_t *tables;
    size_t tables_bytes;
    const int64_t *table_offsets;
    size_t table_count;
    uint64_t group_rows, group_cols;

    int finish;
    int rotate;  /* FINISH_JOIN */
    int boolean; /* FINISH_JOIN: elements are 0 or 1 */
    int target;  /* FINISH_DEQUANTIZE: TO_... */
    int by_column;
    const float *scales;
    size_t scale_count;
    const float *col_scales; /* in the source's order, or NULL */
    const int32_t *order;    /* order[stored column] = column of the source, or NULL */
    size_t order_count, col_scale_count;

    uint8_t *out; /* elements [rows, cols] */
    size_t out_bytes;
    int itemsize;

    uint8_t *scratch;
    size_t scratch_bytes;
} tile_run;

/* Bytes of scratch that decode_run needs for such tiles, 0 where the numbers are impossible. */
size_t decode_run_scratch(const tile_run *run);

/* Checks, decodes and places a run of tiles. Returns -1 where all is well, -2 where the arguments
 * do not fit each other, else the number, in the run, of a chunk that is wrong. */
int64_t decode_run(const tile_run *run);

/* ---- a block on its way into a container ---- */

typedef struct {
    /* The symbols of the chunks, one chunk behind the other, and the size of each. */
    const uint8_t *symbols;
    size_t symbols_bytes;
    const int64_t *raw_bytes;
    size_t chunks;
    /* Chunks form groups of `group`, the last may have fewer; within a group those of the same
     * place, i % places, share a table. */
    size_t places, group;
    const uint8_t *low_bits; /* of each chunk's record, or NULL: 0 */
    int codec;
    /* CODEC_ZSTD: the frame of each chunk, NULL for one that is to stay raw. */
    const uint8_t *const *frames;
    const size_t *frame_bytes;
    /* CODEC_RANS: log2_table as for rans_fit; tables_of(job) of each; room for the longest chunk.
     */
    const int64_t *log2_table;
    rans_fitted *fitted;
    uint8_t *tables; /* RANS_MOST_TABLE_BYTES each */
    uint16_t *table_bytes;
    uint8_t *scratch;
    size_t scratch_bytes;

    uint8_t *slots;
    size_t slots_bytes; /* the slots of all chunks, were they raw, or more */
    uint8_t *records;   /* RECORD_BYTES of each chunk */
    uint32_t *counts;   /* 256 of each chunk; of CODEC_ZSTD and many symbols those of every 17th */
} packing;

/* Number of tables: those of the places of each group. */
size_t tables_of(const packing *job);

/* Packs the chunks of a block; returns the bytes of the slots, -1 where the sizes do not fit. */
int64_t pack_chunks(const packing *job);

/* Counts every stride-th of some symbols, at most 2^32. */
void count_symbols(const uint8_t *symbols, size_t size, size_t stride, uint32_t counts[256]);

enum { ROWS_FINE, ROWS_NOT_FINITE, ROWS_TINY, ROWS_NOT_READ };

/* Quantizes rows of `type` (TO_BF16, TO_F16, TO_F32) to int8 by one scale each, as
 * formats/schemes/int8.py does. Where a row is not finite, or its scale would be subnormal, codes
 * and worst error mean nothing. */
int quantize_rows(const void *words, int type, size_t rows, size_t cols, float *absmax,
                  int8_t *codes, float *worst);

/* Splits the elements of tiles of `tile` elements, the last may have fewer, into planes: all planes
 * of the first tile, then those of the second. `itemsize` is 1, 2, 4 or 8. */
void split_tiles(const uint8_t *elements, int itemsize, int rotate, size_t count, size_t tile,
                 uint8_t *symbols);

/* Compares checksums and padding of `chunks` slots; -1, -2 or the number of the first that is
 * wrong, as above. A chunk of codec zstd is wrong, too, where it is not one plain frame: see
 * zstd_is_plain. */
int64_t check_slots(const uint8_t *slots, size_t slots_bytes, const uint8_t *records,
                    const int64_t *raw_bytes, size_t chunks);

/* Whether the slots of some chunks fill their memory exactly. */
int slots_fill_exactly(const uint8_t *records, size_t chunks, size_t slots_bytes);

/* Whether checksum and padding of a slot are those of its record. */
int slot_is_sound(const uint8_t *slot, const uint8_t *record);

/* Whether some bytes are one Zstandard frame that declares raw_bytes, with an allowed window,
 * without dictionary and checksum, and whose blocks end where the bytes end. The blocks themselves
 * are not looked at. */
int zstd_is_plain(const uint8_t *frame, size_t size, uint64_t raw_bytes);

#endif
