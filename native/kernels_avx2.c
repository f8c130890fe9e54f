/* Kernels for x86-64 with AVX2. */
#include "core.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,popcnt"))),                  \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt")
#endif

#define KERNELS kernels_avx2
#define NAME "avx2"
#define RANS_STEPS rans_steps_avx2
#define XXH3_STRIPES xxh3_stripes_avx2

/* Where each lane of eight finds its word, for each set of lanes that need one: lane k takes word
 * number popcount(set & (2^k - 1)), eight numbers of four bits. */
#define NIBBLE(SET, LANE)                                                                          \
    ((uint64_t)(__builtin_popcount((SET) & ((1 << (LANE)) - 1))) << 8 * (LANE))
#define PLACES(SET)                                                                                \
    (NIBBLE(SET, 0) | NIBBLE(SET, 1) | NIBBLE(SET, 2) | NIBBLE(SET, 3) | NIBBLE(SET, 4) |          \
     NIBBLE(SET, 5) | NIBBLE(SET, 6) | NIBBLE(SET, 7))
#define PLACES4(SET) PLACES(SET), PLACES(SET + 1), PLACES(SET + 2), PLACES(SET + 3)
#define PLACES16(SET) PLACES4(SET), PLACES4(SET + 4), PLACES4(SET + 8), PLACES4(SET + 12)
#define PLACES64(SET) PLACES16(SET), PLACES16(SET + 16), PLACES16(SET + 32), PLACES16(SET + 48)
static const uint64_t places[256] = {PLACES64(0), PLACES64(64), PLACES64(128), PLACES64(192)};

static inline __attribute__((always_inline)) __m256i
eight_lanes(__m256i *state, const rans_table *table, const uint8_t **words, int packed)
{
    int precision = packed ? MIN_PRECISION : table->precision;
    __m256i slot = _mm256_and_si256(*state, _mm256_set1_epi32((1 << precision) - 1));
    __m256i entry = _mm256_i32gather_epi32((const int *)table->entry, slot, 4);
    __m256i quotient = _mm256_srl_epi32(*state, _mm_cvtsi32_si128(precision));
    __m256i frequency, offset, symbol;
    if (packed) {
        __m256i twelve = _mm256_set1_epi32(0xfff);
        frequency = _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(entry, 12), twelve),
                                     _mm256_set1_epi32(1));
        offset = _mm256_and_si256(entry, twelve);
        symbol = _mm256_srli_epi32(entry, 24);
    } else {
        frequency = _mm256_and_si256(entry, _mm256_set1_epi32(0xffff));
        offset = _mm256_srli_epi32(entry, 16);
        symbol = _mm256_i32gather_epi32((const int *)(const void *)table->symbol, slot, 1);
        symbol = _mm256_and_si256(symbol, _mm256_set1_epi32(0xff));
    }
    __m256i now = _mm256_add_epi32(_mm256_mullo_epi32(frequency, quotient), offset);
    __m256i due = _mm256_cmpeq_epi32(_mm256_srli_epi32(now, 16), _mm256_setzero_si256());
    unsigned set = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(due));
    __m256i word = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)*words));
    __m256i place = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)&places[set]));
    word = _mm256_permutevar8x32_epi32(word, place);
    word = _mm256_or_si256(_mm256_slli_epi32(now, 16), word);
    *state = _mm256_blendv_epi8(now, word, due);
    *words += 2 * __builtin_popcount(set);
    return symbol;
}

static inline __attribute__((always_inline)) size_t
avx2_steps(rans_lanes *lanes, const rans_table *table, uint8_t *out, size_t steps, int packed)
{
    __m256i state[4];
    const uint8_t *words = lanes->words, *last = words + 2 * lanes->left;
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    size_t step = 0;
    for (int part = 0; part < 4; part++)
        state[part] = _mm256_loadu_si256((const __m256i *)(lanes->state + 8 * part));
    for (; step < steps && last - words >= 2 * LANES; step++, out += LANES) {
        __m256i first = eight_lanes(&state[0], table, &words, packed);
        __m256i second = eight_lanes(&state[1], table, &words, packed);
        __m256i third = eight_lanes(&state[2], table, &words, packed);
        __m256i fourth = eight_lanes(&state[3], table, &words, packed);
        __m256i symbols = _mm256_packus_epi16(_mm256_packus_epi32(first, second),
                                              _mm256_packus_epi32(third, fourth));
        _mm256_storeu_si256((__m256i *)out, _mm256_permutevar8x32_epi32(symbols, in_order));
    }
    for (int part = 0; part < 4; part++)
        _mm256_storeu_si256((__m256i *)(lanes->state + 8 * part), state[part]);
    lanes->words = words;
    lanes->left = (size_t)(last - words) / 2;
    return step;
}

static size_t rans_steps_avx2(rans_lanes *lanes, const rans_table *table, uint8_t *out,
                              size_t steps)
{
    if (table->precision == MIN_PRECISION)
        return avx2_steps(lanes, table, out, steps, 1);
    return avx2_steps(lanes, table, out, steps, 0);
}

static void xxh3_stripes_avx2(uint64_t acc[8], const uint8_t *data, const uint8_t *secret,
                              size_t stripes)
{
    __m256i sum[2] = {_mm256_loadu_si256((const __m256i *)acc),
                      _mm256_loadu_si256((const __m256i *)(acc + 4))};
    for (; stripes > 0; stripes--, data += 64, secret += 8) {
        for (int half = 0; half < 2; half++) {
            __m256i value = _mm256_loadu_si256((const __m256i *)(data + 32 * half));
            __m256i key =
                _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i *)(secret + 32 * half)));
            __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
            __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
            sum[half] = _mm256_add_epi64(sum[half], _mm256_add_epi64(product, swapped));
        }
    }
    _mm256_storeu_si256((__m256i *)acc, sum[0]);
    _mm256_storeu_si256((__m256i *)(acc + 4), sum[1]);
}

#include "kernels.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int no_avx2_here;
#endif
