/* Kernels for AArch64, where NEON is always there. */
#include "core.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define KERNELS kernels_neon
#define NAME "neon"
#define RANS_STEPS rans_steps_neon

/* Where each lane of four finds its word, for each set of lanes that need one: lane k takes word
 * number popcount(set & (2^k - 1)), into the low half of its four bytes. */
#define WORD(SET, LANE) __builtin_popcount((SET) & ((1 << (LANE)) - 1))
#define PLACE(SET, LANE) 2 * WORD(SET, LANE), 2 * WORD(SET, LANE) + 1, 255, 255
#define PLACES(SET)                                                                                \
    {PLACE(SET, 0), PLACE(SET, 1), PLACE(SET, 2), PLACE(SET, 3)}
#define PLACES4(SET) PLACES(SET), PLACES(SET + 1), PLACES(SET + 2), PLACES(SET + 3)
static const uint8_t places[16][16] = {PLACES4(0), PLACES4(4), PLACES4(8), PLACES4(12)};

/* There is no gather: four loads of one lane each. */
static inline __attribute__((always_inline)) uint32x4_t look_up(const uint32_t *entry,
                                                                uint32x4_t slot)
{
    uint32x4_t found = vdupq_n_u32(0);
    found = vld1q_lane_u32(entry + vgetq_lane_u32(slot, 0), found, 0);
    found = vld1q_lane_u32(entry + vgetq_lane_u32(slot, 1), found, 1);
    found = vld1q_lane_u32(entry + vgetq_lane_u32(slot, 2), found, 2);
    return vld1q_lane_u32(entry + vgetq_lane_u32(slot, 3), found, 3);
}

/* A step of four lanes; returns their symbols in the low bytes of four words. */
static inline __attribute__((always_inline)) uint32x4_t
four_lanes(uint32x4_t *state, const rans_table *table, const uint8_t **words, int packed)
{
    int precision = packed ? MIN_PRECISION : table->precision;
    uint32x4_t slot = vandq_u32(*state, vdupq_n_u32((1u << precision) - 1));
    uint32x4_t entry = look_up(table->entry, slot), frequency, offset, symbol;
    uint32x4_t quotient = vshlq_u32(*state, vdupq_n_s32(-precision));
    if (packed) {
        uint32x4_t twelve = vdupq_n_u32(0xfff);
        frequency = vaddq_u32(vandq_u32(vshrq_n_u32(entry, 12), twelve), vdupq_n_u32(1));
        offset = vandq_u32(entry, twelve);
        symbol = vshrq_n_u32(entry, 24);
    } else {
        const uint32_t symbols[4] = {
            table->symbol[vgetq_lane_u32(slot, 0)], table->symbol[vgetq_lane_u32(slot, 1)],
            table->symbol[vgetq_lane_u32(slot, 2)], table->symbol[vgetq_lane_u32(slot, 3)]};
        frequency = vandq_u32(entry, vdupq_n_u32(0xffff));
        offset = vshrq_n_u32(entry, 16);
        symbol = vld1q_u32(symbols);
    }
    /* The sum over lanes that are due: the set of them, and 32 times their number. */
    static const uint32_t lane_bits[4] = {32 + 1, 32 + 2, 32 + 4, 32 + 8};
    uint32x4_t now = vmlaq_u32(offset, frequency, quotient);
    uint32x4_t due = vcltq_u32(now, vdupq_n_u32(LOWER));
    uint32_t sum = vaddvq_u32(vandq_u32(due, vld1q_u32(lane_bits)));
    uint8x16_t word = vcombine_u8(vld1_u8(*words), vdup_n_u8(0));
    word = vqtbl1q_u8(word, vld1q_u8(places[sum % 16]));
    *state = vbslq_u32(due, vsliq_n_u32(vreinterpretq_u32_u8(word), now, 16), now);
    *words += sum / 16;
    return symbol;
}

static inline __attribute__((always_inline)) size_t
neon_steps(rans_lanes *lanes, const rans_table *table, uint8_t *out, size_t steps, int packed)
{
    uint32x4_t state[LANES / 4];
    const uint8_t *words = lanes->words, *last = words + 2 * lanes->left;
    size_t step = 0;
    for (int part = 0; part < LANES / 4; part++)
        state[part] = vld1q_u32(lanes->state + 4 * part);
    for (; step < steps && last - words >= 2 * LANES; step++, out += LANES)
        for (int half = 0; half < 2; half++) {
            uint32x4_t symbol[4];
            for (int part = 0; part < 4; part++)
                symbol[part] = four_lanes(&state[4 * half + part], table, &words, packed);
            uint16x8_t low = vcombine_u16(vmovn_u32(symbol[0]), vmovn_u32(symbol[1]));
            uint16x8_t high = vcombine_u16(vmovn_u32(symbol[2]), vmovn_u32(symbol[3]));
            vst1q_u8(out + 16 * half, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
        }
    for (int part = 0; part < LANES / 4; part++)
        vst1q_u32(lanes->state + 4 * part, state[part]);
    lanes->words = words;
    lanes->left = (size_t)(last - words) / 2;
    return step;
}

static size_t rans_steps_neon(rans_lanes *lanes, const rans_table *table, uint8_t *out,
                              size_t steps)
{
    if (table->precision == MIN_PRECISION)
        return neon_steps(lanes, table, out, steps, 1);
    return neon_steps(lanes, table, out, steps, 0);
}

#include "kernels.inc.h"
#else
typedef int no_neon_here;
#endif
