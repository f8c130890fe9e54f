/* Kernels for x86-64 with AVX-512 F, BW, DQ and VL, which every server since 2017 (Intel) and 2022
 * (AMD) has. */
#include "core.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx2,fma,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl"))),        \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target(                                                                                \
    "avx2,fma,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

#define KERNELS kernels_avx512
#define NAME "avx512"
#define RANS_STEPS rans_steps_avx512
#define RANS_PAIR_STEPS rans_pair_steps_avx512
#define RANS_ENCODE_STEPS rans_encode_steps_avx512
#define XXH3_STRIPES xxh3_stripes_avx512

static inline __attribute__((always_inline)) __m512i
sixteen_lanes(__m512i *state, const rans_table *table, const uint8_t **words, int packed)
{
    int precision = packed ? MIN_PRECISION : table->precision;
    __m512i slot = _mm512_and_si512(*state, _mm512_set1_epi32((1 << precision) - 1));
    __m512i entry = _mm512_i32gather_epi32(slot, table->entry, 4);
    __m512i quotient = _mm512_srl_epi32(*state, _mm_cvtsi32_si128(precision));
    __m512i frequency, offset, symbol;
    if (packed) {
        __m512i twelve = _mm512_set1_epi32(0xfff);
        frequency = _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(entry, 12), twelve),
                                     _mm512_set1_epi32(1));
        offset = _mm512_and_si512(entry, twelve);
        symbol = _mm512_srli_epi32(entry, 24);
    } else {
        frequency = _mm512_and_si512(entry, _mm512_set1_epi32(0xffff));
        offset = _mm512_srli_epi32(entry, 16);
        symbol = _mm512_i32gather_epi32(slot, table->symbol, 1);
    }
    __m512i now = _mm512_add_epi32(_mm512_mullo_epi32(frequency, quotient), offset);
    __mmask16 due = _mm512_cmplt_epu32_mask(now, _mm512_set1_epi32(LOWER));
    __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)*words));
    word = _mm512_or_si512(_mm512_slli_epi32(now, 16), _mm512_maskz_expand_epi32(due, word));
    *state = _mm512_mask_mov_epi32(now, due, word);
    *words += 2 * __builtin_popcount(due);
    return symbol;
}

static inline __attribute__((always_inline)) void store_symbols(uint8_t *out, __m512i low,
                                                                __m512i high)
{
    _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8(low));
    _mm_storeu_si128((__m128i *)(out + 16), _mm512_cvtepi32_epi8(high));
}

static inline __attribute__((always_inline)) size_t
avx512_steps(rans_lanes *lanes, const rans_table *table, uint8_t *out, size_t steps, int packed)
{
    __m512i low = _mm512_loadu_si512(lanes->state), high = _mm512_loadu_si512(lanes->state + 16);
    const uint8_t *words = lanes->words, *last = words + 2 * lanes->left;
    size_t step = 0;
    for (; step < steps && last - words >= 2 * LANES; step++, out += LANES) {
        __m512i first = sixteen_lanes(&low, table, &words, packed);
        __m512i second = sixteen_lanes(&high, table, &words, packed);
        store_symbols(out, first, second);
    }
    _mm512_storeu_si512(lanes->state, low);
    _mm512_storeu_si512(lanes->state + 16, high);
    lanes->words = words;
    lanes->left = (size_t)(last - words) / 2;
    return step;
}

static size_t rans_steps_avx512(rans_lanes *lanes, const rans_table *table, uint8_t *out,
                                size_t steps)
{
    if (table->precision == MIN_PRECISION)
        return avx512_steps(lanes, table, out, steps, 1);
    return avx512_steps(lanes, table, out, steps, 0);
}

static inline __attribute__((always_inline)) size_t avx512_pair_steps(rans_lanes lanes[2],
                                                                      const rans_table *table,
                                                                      uint8_t *const out[2],
                                                                      size_t steps, int packed)
{
    __m512i low0 = _mm512_loadu_si512(lanes[0].state),
            high0 = _mm512_loadu_si512(lanes[0].state + 16);
    __m512i low1 = _mm512_loadu_si512(lanes[1].state),
            high1 = _mm512_loadu_si512(lanes[1].state + 16);
    const uint8_t *words0 = lanes[0].words, *last0 = words0 + 2 * lanes[0].left;
    const uint8_t *words1 = lanes[1].words, *last1 = words1 + 2 * lanes[1].left;
    size_t step = 0;
    for (; step < steps && last0 - words0 >= 2 * LANES && last1 - words1 >= 2 * LANES; step++) {
        __m512i first0 = sixteen_lanes(&low0, table, &words0, packed);
        __m512i first1 = sixteen_lanes(&low1, table, &words1, packed);
        store_symbols(out[0] + step * LANES, first0, sixteen_lanes(&high0, table, &words0, packed));
        store_symbols(out[1] + step * LANES, first1, sixteen_lanes(&high1, table, &words1, packed));
    }
    _mm512_storeu_si512(lanes[0].state, low0);
    _mm512_storeu_si512(lanes[0].state + 16, high0);
    _mm512_storeu_si512(lanes[1].state, low1);
    _mm512_storeu_si512(lanes[1].state + 16, high1);
    lanes[0].words = words0;
    lanes[1].words = words1;
    lanes[0].left = (size_t)(last0 - words0) / 2;
    lanes[1].left = (size_t)(last1 - words1) / 2;
    return step;
}

static size_t rans_pair_steps_avx512(rans_lanes lanes[2], const rans_table *table,
                                     uint8_t *const out[2], size_t steps)
{
    if (table->precision == MIN_PRECISION)
        return avx512_pair_steps(lanes, table, out, steps, 1);
    return avx512_pair_steps(lanes, table, out, steps, 0);
}

/* Encodes a symbol of each of sixteen lanes; `empty` gathers lanes whose symbol has no frequency.
 */
static inline __attribute__((always_inline)) __m512i encode_sixteen(__m512i state,
                                                                    const uint8_t *symbols,
                                                                    const rans_coder *coder,
                                                                    uint8_t **at, __mmask16 *empty)
{
    __m512i symbol = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)symbols));
    __m512i pair = _mm512_i32gather_epi32(symbol, coder->pair, 4);
    __m512i frequency = _mm512_and_si512(pair, _mm512_set1_epi32(0xffff)),
            start = _mm512_srli_epi32(pair, 16);
    __m512i top = _mm512_srl_epi32(state, _mm_cvtsi32_si128(32 - coder->precision));
    __mmask16 due = _mm512_cmpge_epu32_mask(top, frequency);
    *empty |= _mm512_testn_epi32_mask(frequency, frequency);
    unsigned count = (unsigned)__builtin_popcount(due);
    __m256i words = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(due, state));
    *at -= 2 * count;
    _mm256_mask_storeu_epi16(*at, (__mmask16)((1u << count) - 1), words);
    state = _mm512_mask_srli_epi32(state, due, state, 16);
    /* Quotients are below 2^20, so that single precision is wrong by less than 1: by one unit at
     * most once rounded. */
    __m512 ratio = _mm512_div_ps(_mm512_cvtepu32_ps(state), _mm512_cvtepu32_ps(frequency));
    __m512i quotient = _mm512_cvttps_epi32(ratio);
    __m512i rest = _mm512_sub_epi32(state, _mm512_mullo_epi32(quotient, frequency));
    __mmask16 above = _mm512_movepi32_mask(rest), below = _mm512_cmpge_epi32_mask(rest, frequency);
    __m512i one = _mm512_set1_epi32(1);
    quotient = _mm512_mask_sub_epi32(quotient, above, quotient, one);
    rest = _mm512_mask_add_epi32(rest, above, rest, frequency);
    quotient = _mm512_mask_add_epi32(quotient, below, quotient, one);
    rest = _mm512_mask_sub_epi32(rest, below, rest, frequency);
    quotient = _mm512_sll_epi32(quotient, _mm_cvtsi32_si128(coder->precision));
    return _mm512_add_epi32(_mm512_add_epi32(quotient, rest), start);
}

static uint8_t *rans_encode_steps_avx512(uint32_t state[LANES], const uint8_t *symbols,
                                         size_t steps, const rans_coder *coder, uint8_t *at)
{
    __m512i low = _mm512_loadu_si512(state), high = _mm512_loadu_si512(state + 16);
    __mmask16 empty = 0;
    for (size_t step = steps; step-- > 0;) {
        high = encode_sixteen(high, symbols + step * LANES + 16, coder, &at, &empty);
        low = encode_sixteen(low, symbols + step * LANES, coder, &at, &empty);
        if (empty)
            return NULL;
    }
    _mm512_storeu_si512(state, low);
    _mm512_storeu_si512(state + 16, high);
    return at;
}

static void xxh3_stripes_avx512(uint64_t acc[8], const uint8_t *data, const uint8_t *secret,
                                size_t stripes)
{
    __m512i sum = _mm512_loadu_si512(acc);
    for (; stripes > 0; stripes--, data += 64, secret += 8) {
        __m512i value = _mm512_loadu_si512(data),
                key = _mm512_xor_si512(value, _mm512_loadu_si512(secret));
        __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
        __m512i swapped = _mm512_shuffle_epi32(value, (_MM_PERM_ENUM)_MM_SHUFFLE(1, 0, 3, 2));
        sum = _mm512_add_epi64(sum, _mm512_add_epi64(product, swapped));
    }
    _mm512_storeu_si512(acc, sum);
}

#include "kernels.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int no_avx512_here;
#endif
