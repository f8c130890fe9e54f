/* The bodies of the kernels. Each kernels_*.c includes this once, under the instruction set that it
 * is named for, so that the compiler vectorizes the plain loops; only what it cannot vectorize is
 * written by hand there.
 *
 * The including file defines KERNELS and NAME, and may define RANS_STEPS, RANS_PAIR_STEPS,
 * RANS_ENCODE_STEPS and XXH3_STRIPES.
 */
#include "core.h"

#ifndef RANS_STEPS
#define RANS_STEPS rans_steps_plain

static inline __attribute__((always_inline)) size_t
plain_steps(rans_lanes *lanes, const rans_table *table, uint8_t *out, size_t steps, int packed)
{
    int precision = packed ? MIN_PRECISION : table->precision;
    uint32_t state[LANES], mask = (1u << precision) - 1;
    const uint8_t *words = lanes->words, *last = words + 2 * lanes->left;
    size_t step = 0;
    memcpy(state, lanes->state, sizeof state);
    for (; step < steps && last - words >= 2 * LANES; step++, out += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            uint32_t now = state[lane], slot = now & mask, entry = table->entry[slot];
            if (packed) {
                out[lane] = (uint8_t)(entry >> 24);
                now = ((entry >> 12 & 0xfff) + 1) * (now >> precision) + (entry & 0xfff);
            } else {
                out[lane] = table->symbol[slot];
                now = (entry & 0xffff) * (now >> precision) + (entry >> 16);
            }
            /* No branch: whether a word is due is as good as random. */
            uint32_t due = now < LOWER, refilled = now << 16 | load16(words);
            now ^= (now ^ refilled) & (0u - due);
            words += 2 * due;
            state[lane] = now;
        }
    }
    memcpy(lanes->state, state, sizeof state);
    lanes->words = words;
    lanes->left = (size_t)(last - words) / 2;
    return step;
}

static size_t rans_steps_plain(rans_lanes *lanes, const rans_table *table, uint8_t *out,
                               size_t steps)
{
    if (table->precision == MIN_PRECISION)
        return plain_steps(lanes, table, out, steps, 1);
    return plain_steps(lanes, table, out, steps, 0);
}
#endif

#ifndef RANS_PAIR_STEPS
#define RANS_PAIR_STEPS NULL
#endif

#ifndef RANS_ENCODE_STEPS
#define RANS_ENCODE_STEPS rans_encode_steps_plain

static uint8_t *rans_encode_steps_plain(uint32_t state[LANES], const uint8_t *symbols, size_t steps,
                                        const rans_coder *coder, uint8_t *at)
{
    int precision = coder->precision;
    for (size_t number = steps * LANES; number-- > 0;) {
        const rans_coding *code = &coder->coding[symbols[number]];
        if (code->limit == 0)
            return NULL;
        at = rans_encode_one(&state[number % LANES], code, precision, at);
    }
    return at;
}
#endif

#ifndef XXH3_STRIPES
#define XXH3_STRIPES xxh3_stripes_plain

static void xxh3_stripes_plain(uint64_t acc[8], const uint8_t *data, const uint8_t *secret,
                               size_t stripes)
{
    for (; stripes > 0; stripes--, data += 64, secret += 8) {
        for (int lane = 0; lane < 8; lane++) {
            uint64_t value = load64(data + 8 * lane), key = value ^ load64(secret + 8 * lane);
            acc[lane ^ 1] += value;
            acc[lane] += (key & 0xffffffff) * (key >> 32);
        }
    }
}
#endif

/* ---- lossless
 *
 */

#define JOIN(BITS, WORD)                                                                           \
    static void join_##BITS(const uint8_t *const *plane, int rotate, size_t count,                 \
                            WORD *restrict out)                                                    \
    {                                                                                              \
        enum { PLANES = BITS / 8 };                                                                \
        const uint8_t *restrict from[PLANES];                                                      \
        for (int number = 0; number < PLANES; number++)                                            \
            from[number] = plane[number];                                                          \
        if (rotate) {                                                                              \
            for (size_t i = 0; i < count; i++) {                                                   \
                WORD word = 0;                                                                     \
                for (int number = 0; number < PLANES; number++)                                    \
                    word = (WORD)(word << (8 % BITS) | from[number][i]);                           \
                out[i] = (WORD)(word >> 1 | word << (BITS - 1));                                   \
            }                                                                                      \
            return;                                                                                \
        }                                                                                          \
        for (size_t i = 0; i < count; i++) {                                                       \
            WORD word = 0;                                                                         \
            for (int number = 0; number < PLANES; number++)                                        \
                word = (WORD)(word << (8 % BITS) | from[number][i]);                               \
            out[i] = word;                                                                         \
        }                                                                                          \
    }                                                                                              \
    static void split_##BITS(const WORD *restrict in, int rotate, size_t count,                    \
                             uint8_t *const *plane)                                                \
    {                                                                                              \
        for (int number = 0; number < BITS / 8; number++) {                                        \
            uint8_t *restrict to = plane[number];                                                  \
            int shift = BITS - 8 * (number + 1);                                                   \
            if (!rotate)                                                                           \
                for (size_t i = 0; i < count; i++)                                                 \
                    to[i] = (uint8_t)(in[i] >> shift);                                             \
            else if (shift)                                                                        \
                for (size_t i = 0; i < count; i++)                                                 \
                    to[i] = (uint8_t)(in[i] >> (shift - 1));                                       \
            else                                                                                   \
                for (size_t i = 0; i < count; i++)                                                 \
                    to[i] = (uint8_t)(in[i] << 1 | in[i] >> (BITS - 1));                           \
        }                                                                                          \
    }

JOIN(16, uint16_t)
JOIN(32, uint32_t)
JOIN(64, uint64_t)

static void join(const uint8_t *const *plane, int planes, int rotate, size_t count, void *out)
{
    if (planes == 2)
        join_16(plane, rotate, count, out);
    else if (planes == 4)
        join_32(plane, rotate, count, out);
    else if (planes == 8)
        join_64(plane, rotate, count, out);
    else
        memcpy(out, plane[0], count);
}

static void split(const void *elements, int planes, int rotate, size_t count, uint8_t *const *plane)
{
    if (planes == 2)
        split_16(elements, rotate, count, plane);
    else if (planes == 4)
        split_32(elements, rotate, count, plane);
    else if (planes == 8)
        split_64(elements, rotate, count, plane);
    else
        memcpy(plane[0], elements, count);
}

/* ---- int8: codes -> weights ---- */

static inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float value_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t to_bf16(float value) /* not of a NaN */
{
    uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t to_f16(float value) /* not of a NaN */
{
    uint32_t bits = bits_of(value), sign = bits & 0x80000000u, size = bits ^ sign;
    /* Adding 0.5 lets the addition round a subnormal at its last place. */
    uint32_t subnormal = bits_of(value_of(size) + 0.5f) - 0x3f000000u;
    uint32_t normal = (size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13;
    uint32_t half = size < 0x38800000u ? subnormal : normal;
    half = size >= 0x47800000u ? 0x7c00 : half;
    return (uint16_t)(half | sign >> 16);
}

static inline uint32_t to_f32(float value)
{
    return bits_of(value);
}

#define DEQUANTIZE(CODE, TARGET, WORD)                                                             \
    static void CODE##_##TARGET(const CODE##_t *restrict code, size_t count, float scale,          \
                                const float *restrict factor, WORD *restrict out)                  \
    {                                                                                              \
        if (factor)                                                                                \
            for (size_t i = 0; i < count; i++)                                                     \
                out[i] = TARGET((float)code[i] * (scale * factor[i]));                             \
        else                                                                                       \
            for (size_t i = 0; i < count; i++)                                                     \
                out[i] = TARGET((float)code[i] * scale);                                           \
    }

DEQUANTIZE(int8, to_bf16, uint16_t)
DEQUANTIZE(int8, to_f16, uint16_t)
DEQUANTIZE(int8, to_f32, uint32_t)
DEQUANTIZE(int16, to_bf16, uint16_t)
DEQUANTIZE(int16, to_f16, uint16_t)
DEQUANTIZE(int16, to_f32, uint32_t)

static void dequantize8(const int8_t *code, size_t count, float scale, const float *factor,
                        int target, void *out)
{
    if (target == TO_BF16)
        int8_to_bf16(code, count, scale, factor, out);
    else if (target == TO_F16)
        int8_to_f16(code, count, scale, factor, out);
    else
        int8_to_f32(code, count, scale, factor, out);
}

static void dequantize16(const int16_t *code, size_t count, float scale, const float *factor,
                         int target, void *out)
{
    if (target == TO_BF16)
        int16_to_bf16(code, count, scale, factor, out);
    else if (target == TO_F16)
        int16_to_f16(code, count, scale, factor, out);
    else
        int16_to_f32(code, count, scale, factor, out);
}

static void widen(const int8_t *restrict low, const int8_t *restrict high, int low_bits,
                  size_t count, int16_t *restrict code)
{
    int16_t factor = (int16_t)(1 << low_bits);
    for (size_t i = 0; i < count; i++)
        code[i] = (int16_t)(low[i] + high[i] * factor);
}

static int has_lowest(const int8_t *code, size_t count)
{
    int8_t lowest = 0;
    for (size_t i = 0; i < count; i++)
        lowest = code[i] < lowest ? code[i] : lowest;
    return lowest == -128;
}

/* ---- int8: weights -> codes ---- */

static uint32_t largest(const void *words, int itemsize, size_t count)
{
    if (itemsize == 2) {
        const uint16_t *word = words;
        uint16_t most = 0;
        for (size_t i = 0; i < count; i++) {
            uint16_t size = word[i] & 0x7fff;
            most = size > most ? size : most;
        }
        return most;
    }
    const uint32_t *word = words;
    uint32_t most = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t size = word[i] & 0x7fffffff;
        most = size > most ? size : most;
    }
    return most;
}

/* Rounds to an integer, ties to even, what lies between -2^22 and 2^22: the additions do the
 * rounding. */
static inline float to_integer(float value)
{
    return value + 12582912.0f - 12582912.0f;
}

/* Weights that are finite, under the scales of their channels, give no other codes; for others any
 * code will do. */
static inline int8_t to_code(float rounded)
{
    float bounded = rounded < 127.0f ? rounded : 127.0f;
    bounded = bounded > -127.0f ? bounded : -127.0f;
    return (int8_t)(int32_t)bounded;
}

#define QUANTIZE(BITS, WORD, VALUE)                                                                \
    static uint32_t quantize_##BITS(const WORD *restrict word, size_t count, float scale,          \
                                    const float *restrict factor, int8_t *restrict code)           \
    {                                                                                              \
        uint32_t most = 0;                                                                         \
        if (factor)                                                                                \
            for (size_t i = 0; i < count; i++) {                                                   \
                float quotient = VALUE / factor[i], rounded = to_integer(quotient);                \
                uint32_t error = bits_of((quotient - rounded) * factor[i]) & 0x7fffffff;           \
                code[i] = to_code(rounded);                                                        \
                most = error > most ? error : most;                                                \
            }                                                                                      \
        else                                                                                       \
            for (size_t i = 0; i < count; i++) {                                                   \
                float quotient = VALUE / scale, rounded = to_integer(quotient);                    \
                uint32_t error = bits_of(quotient - rounded) & 0x7fffffff;                         \
                code[i] = to_code(rounded);                                                        \
                most = error > most ? error : most;                                                \
            }                                                                                      \
        return most;                                                                               \
    }

QUANTIZE(16, uint16_t, value_of((uint32_t)word[i] << 16))
QUANTIZE(32, uint32_t, value_of(word[i]))

static uint32_t quantize(const void *words, int itemsize, size_t count, float scale,
                         const float *factor, int8_t *code)
{
    if (itemsize == 2)
        return quantize_16(words, count, scale, factor, code);
    return quantize_32(words, count, scale, factor, code);
}

const kernel_set KERNELS = {
    NAME,        RANS_STEPS,   RANS_PAIR_STEPS, RANS_ENCODE_STEPS, XXH3_STRIPES, join,     split,
    dequantize8, dequantize16, widen,           has_lowest,        largest,      quantize,
};
