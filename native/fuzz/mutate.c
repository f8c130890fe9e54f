/* Runs every target on mutated inputs, for machines without libFuzzer: mutate EXECUTIONS [SEED].
 *
 * Inputs begin as valid ones where that matters (a coded chunk, a table) or as noise, and are
 * changed by flips, copies, cuts and random bytes. Every set of kernels that the machine can run
 * takes its turn.
 */
#include <stdio.h>
#include <stdlib.h>

#include "targets.h"

#define MOST_BYTES 6000

static uint64_t state;

static uint64_t random_number(void) /* xorshift64* */
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Du;
}

static size_t below(size_t limit)
{
    return limit ? (size_t)(random_number() % limit) : 0;
}

/* Writes an input for fuzz_decode that holds a valid chunk: two symbols, precision 12. */
static size_t make_chunk(uint8_t *input)
{
    uint16_t frequency[256] = {0};
    uint32_t part = 1 + (uint32_t)below(4096);
    uint8_t first = (uint8_t)random_number(), second = (uint8_t)random_number();
    rans_coder coder;
    uint8_t symbols[1000], buffer[STATE_BYTES + 2000];
    size_t count = below(sizeof symbols);
    frequency[first] = (uint16_t)part;
    frequency[second] += (uint16_t)(4096 - part);
    if (rans_build_coder(frequency, 12, &coder))
        abort();
    for (size_t i = 0; i < count; i++)
        symbols[i] = frequency[second] && random_number() % 2 ? second : first;
    size_t bound = rans_encode_bound(count), size = rans_encode(symbols, count, &coder, buffer);
    const uint8_t head[] = {0,     1,      (uint8_t)((part - 1) >> 8), (uint8_t)(part - 1),
                            first, second, (uint8_t)(count >> 8),      (uint8_t)count};
    memcpy(input, head, sizeof head);
    memcpy(input + sizeof head, buffer + bound - size, size);
    return sizeof head + size;
}

static size_t make_table(uint8_t *input)
{
    size_t size = 33;
    uint32_t left = 4096;
    memset(input, 0, 33);
    input[0] = 12;
    for (int symbol = 0; symbol < 256 && left; symbol++) {
        uint32_t count = symbol == 255 ? left : (uint32_t)below(left < 300 ? left + 1 : 300);
        if (!count)
            continue;
        input[1 + symbol / 8] |= (uint8_t)(1 << symbol % 8);
        left -= count--;
        input[size++] = (uint8_t)(count > 127 ? 128 | (count & 127) : count);
        if (count > 127)
            input[size++] = (uint8_t)(count >> 7);
    }
    return size;
}

static size_t make_noise(uint8_t *input)
{
    size_t size = below(1500);
    for (size_t at = 0; at < size; at++)
        input[at] = (uint8_t)random_number();
    return size;
}

static size_t mutate(uint8_t *input, size_t size)
{
    for (size_t changes = below(4); changes > 0 && size; changes--) {
        size_t at = below(size), other = below(size), most = size - (at > other ? at : other);
        switch (random_number() % 5) {
        case 0:
            input[at] ^= (uint8_t)(1 << random_number() % 8);
            break;
        case 1:
            input[at] = (uint8_t)random_number();
            break;
        case 2:
            memmove(input + at, input + other, below(most + 1));
            break;
        case 3:
            size = at;
            break;
        default:
            for (size_t extra = below(40); extra > 0 && size < MOST_BYTES; extra--)
                input[size++] = (uint8_t)random_number();
        }
    }
    return size;
}

static const struct {
    int (*run)(const uint8_t *, size_t);
    size_t (*make)(uint8_t *);
    const char *name;
} targets[] = {
    {fuzz_table, make_table, "table"},   {fuzz_decode, make_chunk, "decode"},
    {fuzz_encode, make_chunk, "encode"}, {fuzz_fit, make_noise, "fit"},
    {fuzz_check, make_noise, "check"},   {fuzz_run, make_noise, "run"},
    {fuzz_pack, make_noise, "pack"},     {fuzz_rows, make_noise, "rows"},
};

int main(int argc, char **argv)
{
    static uint8_t input[MOST_BYTES + STATE_BYTES + 4000];
    unsigned long long executions = argc > 1 ? strtoull(argv[1], NULL, 10) : 100000;
    size_t count = sizeof targets / sizeof *targets;
    const kernel_set *sets[3];
    size_t set_count = kernels_supported(sets);
    state = (argc > 2 ? strtoull(argv[2], NULL, 10) : 1) * 0x9E3779B97F4A7C15u + 1;
    for (unsigned long long number = 0; number < executions; number++) {
        size_t target = (size_t)(number % count);
        kernels_use(sets[number / count % set_count]->name);
        size_t size = mutate(input, targets[target].make(input));
        targets[target].run(input, size);
    }
    printf("%llu executions of %zu targets with %zu sets of kernels: no finding\n", executions,
           count, set_count);
    return 0;
}
