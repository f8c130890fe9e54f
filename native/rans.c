/* Codec rans (SPEC.md 6.1): tables, one chunk from bytes to symbols and back. */
#include "core.h"

int rans_build_table(const uint16_t frequency[256], int precision, rans_table *table)
{
    if (precision < MIN_PRECISION || precision > MAX_PRECISION)
        return -1;
    uint32_t total = 0;
    for (int symbol = 0; symbol < 256; symbol++)
        total += frequency[symbol];
    if (total != 1u << precision)
        return -1;
    table->precision = precision;
    memcpy(table->frequency, frequency, sizeof table->frequency);
    uint32_t slot = 0;
    for (uint32_t symbol = 0; symbol < 256; symbol++) {
        uint32_t count = frequency[symbol];
        if (precision == MIN_PRECISION) {
            uint32_t shared = symbol << 24 | (count - 1) << 12;
            for (uint32_t offset = 0; offset < count; offset++)
                table->entry[slot + offset] = shared | offset;
        } else {
            for (uint32_t offset = 0; offset < count; offset++)
                table->entry[slot + offset] = count | offset << 16;
            memset(table->symbol + slot, (int)symbol, count);
        }
        slot += count;
    }
    memset(table->symbol + (1 << MAX_PRECISION), 0, sizeof table->symbol - (1 << MAX_PRECISION));
    return 0;
}

int rans_parse_table(const uint8_t *packed, size_t size, rans_table *table)
{
    uint16_t frequency[256] = {0};
    size_t at = RANS_HEAD_BYTES;
    if (size < RANS_HEAD_BYTES)
        return -1;
    for (int symbol = 0; symbol < 256; symbol++) {
        if (!(packed[1 + symbol / 8] >> symbol % 8 & 1))
            continue;
        if (at == size)
            return -1;
        uint32_t value = packed[at++];
        if (value & 128) {
            if (at == size || packed[at] == 0 || packed[at] > 127)
                return -1;
            value = (value & 127) | (uint32_t)packed[at++] << 7;
        }
        frequency[symbol] = (uint16_t)(value + 1);
    }
    return at == size ? rans_build_table(frequency, packed[0], table) : -1;
}

/* Decodes one symbol of a lane; -1 where a word is needed and none is left. */
static int decode_one(rans_lanes *lanes, int lane, const rans_table *table, uint8_t *symbol)
{
    uint32_t state = lanes->state[lane];
    uint32_t slot = state & ((1u << table->precision) - 1), entry = table->entry[slot];
    uint32_t frequency = entry & 0xffff, offset = entry >> 16;
    *symbol = table->symbol[slot];
    if (table->precision == MIN_PRECISION) {
        *symbol = (uint8_t)(entry >> 24);
        frequency = (entry >> 12 & 0xfff) + 1;
        offset = entry & 0xfff;
    }
    state = frequency * (state >> table->precision) + offset;
    if (state < LOWER) {
        if (lanes->left == 0)
            return -1;
        state = state << 16 | load16(lanes->words);
        lanes->words += 2;
        lanes->left--;
    }
    lanes->state[lane] = state;
    return 0;
}

static int begin(const rans_chunk *chunk, rans_lanes *lanes)
{
    if (chunk->stored_bytes < STATE_BYTES || chunk->stored_bytes % 2)
        return -1;
    for (int lane = 0; lane < LANES; lane++) {
        lanes->state[lane] = load32(chunk->stored + 4 * lane);
        if (lanes->state[lane] < LOWER)
            return -1;
    }
    lanes->words = chunk->stored + STATE_BYTES;
    lanes->left = (chunk->stored_bytes - STATE_BYTES) / 2;
    return 0;
}

/* Decodes what is left behind `done` symbols, a multiple of 32. */
static int finish(const rans_chunk *chunk, rans_lanes *lanes, const rans_table *table, size_t done)
{
    uint8_t *symbols = chunk->symbols;
    size_t raw_bytes = chunk->raw_bytes;
    done += LANES * kernels()->rans_steps(lanes, table, symbols + done, (raw_bytes - done) / LANES);
    for (; done < raw_bytes; done++)
        if (decode_one(lanes, (int)(done % LANES), table, symbols + done))
            return -1;
    for (int lane = 0; lane < LANES; lane++)
        if (lanes->state[lane] != LOWER)
            return -1;
    return lanes->left ? -1 : 0;
}

int rans_decode(const uint8_t *stored, size_t stored_bytes, const rans_table *table,
                uint8_t *symbols, size_t raw_bytes)
{
    rans_chunk chunk = {stored, stored_bytes, symbols, raw_bytes};
    rans_lanes lanes;
    return begin(&chunk, &lanes) ? -1 : finish(&chunk, &lanes, table, 0);
}

int rans_decode_pair(const rans_chunk chunk[2], const rans_table *table)
{
    rans_lanes lanes[2];
    uint8_t *const out[2] = {chunk[0].symbols, chunk[1].symbols};
    size_t shorter =
               chunk[0].raw_bytes < chunk[1].raw_bytes ? chunk[0].raw_bytes : chunk[1].raw_bytes,
           steps = 0;
    if (begin(&chunk[0], &lanes[0]) || begin(&chunk[1], &lanes[1]))
        return -1;
    if (kernels()->rans_pair_steps)
        steps = kernels()->rans_pair_steps(lanes, table, out, shorter / LANES);
    return finish(&chunk[0], &lanes[0], table, LANES * steps) ||
                   finish(&chunk[1], &lanes[1], table, LANES * steps)
               ? -1
               : 0;
}

int rans_build_coder(const uint16_t frequency[256], int precision, rans_coder *coder)
{
    if (precision < MIN_PRECISION || precision > MAX_PRECISION)
        return -1;
    uint32_t total = 1u << precision, start = 0;
    coder->precision = precision;
    for (int symbol = 0; symbol < 256; symbol++) {
        uint32_t count = frequency[symbol];
        rans_coding *code = &coder->coding[symbol];
        code->limit = count;
        code->complement = total - count;
        /* floor(state * ceil(2^64 / f) / 2^64) is state div f for every state below 2^32; for f = 1
         * the reciprocal below gives state - 1, which the bias makes up for. */
        code->reciprocal = count < 2 ? UINT64_MAX : UINT64_MAX / count + 1;
        code->bias = count == 1 ? start + total - 1 : start;
        coder->pair[symbol] = count | start << 16;
        start += count;
        if (start > total)
            return -1;
    }
    return start == total ? 0 : -1;
}

size_t rans_encode_bound(size_t raw_bytes)
{
    return STATE_BYTES + 2 * raw_bytes;
}

size_t rans_encode(const uint8_t *symbols, size_t raw_bytes, const rans_coder *coder,
                   uint8_t *buffer)
{
    uint32_t state[LANES];
    uint8_t *end = buffer + rans_encode_bound(raw_bytes), *at = end;
    size_t steps = raw_bytes / LANES;
    for (int lane = 0; lane < LANES; lane++)
        state[lane] = LOWER;
    for (size_t number = raw_bytes; number-- > steps * LANES;) {
        const rans_coding *code = &coder->coding[symbols[number]];
        if (code->limit == 0)
            return 0;
        at = rans_encode_one(&state[number % LANES], code, coder->precision, at);
    }
    at = kernels()->rans_encode_steps(state, symbols, steps, coder, at);
    if (!at)
        return 0;
    at -= STATE_BYTES;
    for (int lane = 0; lane < LANES; lane++)
        store32(at + 4 * lane, state[lane]);
    return (size_t)(end - at);
}

/* ---- fitting (rans_fit.py) ---- */

#define COST_BITS 16

typedef struct {
    int64_t cost;
    int symbol;
} offer;

typedef struct {
    offer item[256];
    int size;
} offers;

static int before(offer a, offer b)
{
    return a.cost < b.cost || (a.cost == b.cost && a.symbol < b.symbol);
}

static void sift_down(offers *heap, int at)
{
    for (;;) {
        int least = at;
        for (int child = 2 * at + 1; child <= 2 * at + 2; child++)
            if (child < heap->size && before(heap->item[child], heap->item[least]))
                least = child;
        if (least == at)
            return;
        offer moved = heap->item[at];
        heap->item[at] = heap->item[least];
        heap->item[least] = moved;
        at = least;
    }
}

/* What one more unit (step 1) or one less (step -1) costs a symbol; 0 where its frequency would
 * become 0. */
static int make_offer(const int64_t *counts, const int64_t *log2_table, const int64_t *frequency,
                      int symbol, int step, offer *made)
{
    int64_t now = frequency[symbol];
    if (now + step < 1)
        return 0;
    made->cost = counts[symbol] * (log2_table[now] - log2_table[now + step]);
    made->symbol = symbol;
    return 1;
}

static void move_units(int64_t *frequency, const int64_t *counts, const int64_t *log2_table,
                       int64_t units, int step)
{
    offers heap = {.size = 0};
    for (int symbol = 0; symbol < 256; symbol++)
        if (counts[symbol] > 0 &&
            make_offer(counts, log2_table, frequency, symbol, step, &heap.item[heap.size]))
            heap.size++;
    for (int at = heap.size / 2 - 1; at >= 0; at--)
        sift_down(&heap, at);
    for (; units > 0 && heap.size > 0; units--) {
        int symbol = heap.item[0].symbol;
        frequency[symbol] += step;
        if (!make_offer(counts, log2_table, frequency, symbol, step, &heap.item[0]))
            heap.item[0] = heap.item[--heap.size];
        sift_down(&heap, 0);
    }
}

static int64_t fit_one(const int64_t *counts, int64_t sum, const int64_t *log2_table, int precision,
                       int64_t frequency[256])
{
    int64_t total = (int64_t)1 << precision, missing = total, cost = 0;
    for (int symbol = 0; symbol < 256; symbol++) {
        int64_t share = counts[symbol] * total / sum;
        frequency[symbol] = counts[symbol] > 0 ? (share > 1 ? share : 1) : 0;
        missing -= frequency[symbol];
    }
    if (missing > 0)
        move_units(frequency, counts, log2_table, missing, 1);
    else if (missing < 0)
        move_units(frequency, counts, log2_table, -missing, -1);
    for (int symbol = 0; symbol < 256; symbol++)
        if (counts[symbol] > 0)
            cost += counts[symbol] *
                    (((int64_t)precision << COST_BITS) - log2_table[frequency[symbol]]);
    return cost;
}

int rans_fit(const int64_t counts[256], const int64_t *log2_table, uint16_t frequency[256])
{
    int64_t sum = 0, fitted[MAX_PRECISION - MIN_PRECISION + 1][256],
            cost[MAX_PRECISION - MIN_PRECISION + 1];
    for (int symbol = 0; symbol < 256; symbol++) {
        if (counts[symbol] < 0 || counts[symbol] > (int64_t)1 << 32)
            return 0;
        sum += counts[symbol];
    }
    if (sum == 0)
        return 0;
    for (int number = 0; number <= MAX_PRECISION - MIN_PRECISION; number++)
        cost[number] = fit_one(counts, sum, log2_table, MIN_PRECISION + number, fitted[number]);
    int number = 0;
    /* A lower precision is taken where it costs at most 1/256 bit a symbol more than the highest.
     */
    while (cost[number] >
           cost[MAX_PRECISION - MIN_PRECISION] + ((int64_t)1 << COST_BITS) / 256 * sum)
        number++;
    for (int symbol = 0; symbol < 256; symbol++)
        frequency[symbol] = (uint16_t)fitted[number][symbol];
    return MIN_PRECISION + number;
}
