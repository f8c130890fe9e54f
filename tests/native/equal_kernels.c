/* Runs every set of kernels on the same inputs: equal_kernels ROUNDS. Names the kernel and the set
 * where bits differ from the portable set's, else prints a digest of all bits, which is the same on
 * every machine. */
#include <stdio.h>
#include <stdlib.h>

#include "core.h"

#define MOST 2000

static uint64_t state = 1, digest = 0xcbf29ce484222325u;

static uint32_t random_word(void) /* xorshift64* */
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)(state * 0x2545F4914F6CDD1Du >> 32);
}

typedef struct {
    size_t count;
    int planes, rotate, precision, target, low_bits;
    uint8_t words[8 * MOST]; /* elements, codes and symbols */
    float scale, factor[MOST];
    uint16_t frequency[256];
} example;

typedef struct {
    size_t size;
    uint8_t bytes[16 * MOST];
} result;

/* Weights and factors are finite, as those are that reach the kernels. */
static float some_float(void)
{
    float value;
    uint32_t bits = (random_word() & 0x80ffffff) | (96 + random_word() % 50) << 23;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void fill(example *made)
{
    uint32_t left;
    made->count = 1 + random_word() % MOST;
    made->planes = 1 << random_word() % 4;
    made->rotate = (int)(random_word() % 2);
    made->target = (int)(random_word() % 3);
    made->low_bits = (int)(random_word() % 8);
    made->precision = MIN_PRECISION + (int)(random_word() % 3);
    for (size_t i = 0; i < sizeof made->words; i++)
        made->words[i] = (uint8_t)random_word();
    made->scale = some_float();
    for (size_t i = 0; i < MOST; i++)
        made->factor[i] = some_float();
    memset(made->frequency, 0, sizeof made->frequency);
    left = 1u << made->precision;
    for (int kinds = (int)(random_word() % 256); kinds > 0 && left > 1; kinds--) {
        uint32_t part = 1 + random_word() % (left / 2 + 1);
        made->frequency[random_word() % 256] += (uint16_t)part;
        left -= part < left ? part : left - 1;
        if (part >= left)
            break;
    }
    /* What is missing, or too much, goes to the first symbol. */
    uint32_t sum = 0;
    for (int symbol = 1; symbol < 256; symbol++)
        sum += made->frequency[symbol];
    made->frequency[0] = (uint16_t)((1u << made->precision) - sum);
}

static void put(result *to, const void *bytes, size_t size)
{
    if (to->size + size > sizeof to->bytes)
        abort();
    memcpy(to->bytes + to->size, bytes, size);
    to->size += size;
}

static void run_rans(const example *from, result *to)
{
    static rans_table table;
    static rans_coder coder;
    static uint8_t symbols[MOST], again[2][MOST], buffer[STATE_BYTES + 2 * MOST];
    size_t count = from->count, held = 0, bound = rans_encode_bound(count);
    uint8_t kinds[256];
    for (int symbol = 0; symbol < 256; symbol++)
        if (from->frequency[symbol])
            kinds[held++] = (uint8_t)symbol;
    for (size_t i = 0; i < count; i++)
        symbols[i] = kinds[from->words[i] % held];
    if (rans_build_table(from->frequency, from->precision, &table) ||
        rans_build_coder(from->frequency, from->precision, &coder))
        abort();
    size_t size = rans_encode(symbols, count, &coder, buffer);
    const uint8_t *stored = buffer + bound - size;
    rans_chunk pair[2] = {{stored, size, again[0], count}, {stored, size, again[1], count}};
    if (rans_decode(stored, size, &table, again[0], count) || memcmp(again[0], symbols, count))
        abort();
    if (rans_decode_pair(pair, &table) || memcmp(again[1], symbols, count))
        abort();
    put(to, stored, size);
}

static void run_planes(const example *from, result *to)
{
    static uint8_t split[8][MOST], joined[8 * MOST];
    uint8_t *planes[8];
    size_t size = from->count * (size_t)from->planes;
    for (int plane = 0; plane < 8; plane++)
        planes[plane] = split[plane];
    kernels()->split(from->words, from->planes, from->rotate, from->count, planes);
    kernels()->join((const uint8_t *const *)planes, from->planes, from->rotate, from->count, joined);
    if (memcmp(joined, from->words, size))
        abort();
    for (int plane = 0; plane < from->planes; plane++)
        put(to, planes[plane], from->count);
}

static void run_hash(const example *from, result *to)
{
    uint64_t hash = xxh3_of_slot(from->words, (from->count + 15) / 16 * 16);
    put(to, &hash, sizeof hash);
}

static void run_weights(const example *from, result *to)
{
    static uint32_t weights[MOST];
    static int16_t wide[MOST];
    const int8_t *codes = (const int8_t *)from->words;
    size_t count = from->count, size = count * (from->target == TO_F32 ? 4 : 2);
    const float *factor = from->rotate ? from->factor : NULL;
    int lowest = kernels()->has_lowest(codes, count);
    kernels()->dequantize8(codes, count, from->scale, factor, from->target, weights);
    put(to, weights, size);
    kernels()->widen(codes, codes + MOST, from->low_bits, count, wide);
    put(to, wide, 2 * count);
    kernels()->dequantize16(wide, count, from->scale, factor, from->target, weights);
    put(to, weights, size);
    put(to, &lowest, sizeof lowest);
}

static void run_codes(const example *from, result *to)
{
    static int8_t codes[MOST];
    static uint16_t halves[MOST];
    const uint16_t *high = (const uint16_t *)(const void *)from->factor;
    const float *factor = from->rotate ? from->factor : NULL;
    uint32_t found[3];
    for (size_t i = 0; i < MOST; i++)
        halves[i] = high[2 * i + 1]; /* bf16 of the factors */
    found[0] = kernels()->largest(from->factor, 4, from->count);
    found[1] = kernels()->largest(halves, 2, from->count);
    found[2] = kernels()->quantize(halves, 2, from->count, 0.5f, NULL, codes);
    put(to, codes, from->count);
    put(to, found, sizeof found);
    /* Quotients near 1, as those of a row by its own scale. */
    found[0] = kernels()->quantize(from->factor, 4, from->count, from->scale, factor, codes);
    if (factor)
        put(to, codes, from->count);
    put(to, found, factor ? 4 : 0);
}

static const struct {
    const char *name;
    void (*run)(const example *, result *);
} subjects[] = {{"rans", run_rans},
                {"planes", run_planes},
                {"xxh3", run_hash},
                {"weights", run_weights},
                {"codes", run_codes}};

int main(int argc, char **argv)
{
    static example input;
    static result expected, got;
    const kernel_set *sets[3];
    size_t count = kernels_supported(sets);
    for (int round = argc > 1 ? atoi(argv[1]) : 1000; round > 0; round--) {
        fill(&input);
        for (size_t subject = 0; subject < sizeof subjects / sizeof *subjects; subject++) {
            expected.size = 0;
            kernels_use("portable");
            subjects[subject].run(&input, &expected);
            for (size_t at = 0; at < expected.size; at++)
                digest = (digest ^ expected.bytes[at]) * 0x100000001b3u;
            for (size_t set = 0; set < count; set++) {
                got.size = 0;
                kernels_use(sets[set]->name);
                subjects[subject].run(&input, &got);
                if (got.size == expected.size && !memcmp(got.bytes, expected.bytes, got.size))
                    continue;
                printf("%s of %s differs from portable\n", subjects[subject].name, sets[set]->name);
                return 1;
            }
        }
    }
    for (size_t set = 0; set < count; set++)
        printf("%s ", sets[set]->name);
    printf("%016llx\n", (unsigned long long)digest);
    return 0;
}
