/* One target for each entry point of the core. Each splits its input into arguments in buffers of
 * exactly their size, so that AddressSanitizer sees every byte that is read or written outside. */
#include <stdlib.h>

#include "targets.h"

typedef struct {
    const uint8_t *at;
    size_t left;
} reader;

static uint64_t take(reader *input, int bytes)
{
    uint64_t value = 0;
    for (; bytes > 0; bytes--) {
        value = value << 8 | (input->left ? *input->at : 0);
        if (input->left) {
            input->at++;
            input->left--;
        }
    }
    return value;
}

/* Copies `size` bytes, zeros behind the end of the input, into memory of that size. */
static uint8_t *take_copy(reader *input, size_t size)
{
    uint8_t *copy = calloc(size ? size : 1, 1);
    size_t present = size < input->left ? size : input->left;
    if (!copy)
        abort();
    memcpy(copy, input->at, present);
    input->at += present;
    input->left -= present;
    return copy;
}

static void require(int truth)
{
    if (!truth)
        abort();
}

/* Frequencies that add up: cut points of the table, in an order that does not matter. */
static int take_frequencies(reader *input, uint16_t frequency[256])
{
    int precision = MIN_PRECISION + (int)(take(input, 1) % 3);
    uint32_t left = 1u << precision;
    memset(frequency, 0, 256 * sizeof *frequency);
    for (int kinds = (int)take(input, 1); kinds > 0 && left > 1; kinds--) {
        uint32_t part = 1 + (uint32_t)take(input, 2) % left;
        frequency[take(input, 1)] += (uint16_t)part;
        left -= part;
    }
    frequency[take(input, 1)] += (uint16_t)left;
    return precision;
}

int fuzz_table(const uint8_t *data, size_t size)
{
    rans_table *table = malloc(sizeof *table);
    uint8_t *copy = malloc(size ? size : 1);
    require(table && copy);
    memcpy(copy, data, size);
    if (!rans_parse_table(copy, size, table)) {
        uint32_t total = 0;
        for (int symbol = 0; symbol < 256; symbol++)
            total += table->frequency[symbol];
        require(total == 1u << table->precision);
    }
    free(copy);
    free(table);
    return 0;
}

int fuzz_decode(const uint8_t *data, size_t size)
{
    reader input = {data, size};
    uint16_t frequency[256];
    rans_table *table = malloc(sizeof *table);
    require(table != NULL);
    int precision = take_frequencies(&input, frequency);
    require(!rans_build_table(frequency, precision, table));
    size_t raw_bytes = take(&input, 2) % 5000, stored_bytes = input.left;
    uint8_t *stored = take_copy(&input, stored_bytes), *symbols = malloc(raw_bytes ? raw_bytes : 1);
    uint8_t *other = malloc(raw_bytes ? raw_bytes : 1);
    require(symbols && other);
    int wrong = rans_decode(stored, stored_bytes, table, symbols, raw_bytes);
    /* Side by side with itself, and with its own head, which is no chunk. */
    rans_chunk pair[2] = {{stored, stored_bytes, symbols, raw_bytes},
                          {stored, stored_bytes, other, raw_bytes}};
    require(rans_decode_pair(pair, table) == wrong);
    require(wrong || !memcmp(symbols, other, raw_bytes));
    pair[1].raw_bytes = raw_bytes / 2;
    rans_decode_pair(pair, table);
    free(other);
    if (!wrong) {
        /* An encoder makes the same bytes of the symbols: there is one coding of a chunk. */
        rans_coder coder;
        require(!rans_build_coder(frequency, precision, &coder));
        size_t bound = rans_encode_bound(raw_bytes);
        uint8_t *buffer = malloc(bound);
        require(buffer != NULL);
        size_t again = rans_encode(symbols, raw_bytes, &coder, buffer);
        require(again == stored_bytes && !memcmp(buffer + bound - again, stored, again));
        free(buffer);
    }
    free(symbols);
    free(stored);
    free(table);
    return 0;
}

int fuzz_encode(const uint8_t *data, size_t size)
{
    reader input = {data, size};
    uint16_t frequency[256];
    rans_coder coder;
    int precision = take_frequencies(&input, frequency);
    size_t raw_bytes = input.left, bound = rans_encode_bound(raw_bytes);
    uint8_t *symbols = take_copy(&input, raw_bytes), *buffer = malloc(bound),
            *again = malloc(raw_bytes ? raw_bytes : 1);
    rans_table *table = malloc(sizeof *table);
    require(buffer && again && table && !rans_build_coder(frequency, precision, &coder));
    require(!rans_build_table(frequency, precision, table));
    size_t stored_bytes = rans_encode(symbols, raw_bytes, &coder, buffer);
    if (stored_bytes) {
        require(!rans_decode(buffer + bound - stored_bytes, stored_bytes, table, again, raw_bytes));
        require(!memcmp(symbols, again, raw_bytes));
    }
    free(symbols);
    free(buffer);
    free(again);
    free(table);
    return 0;
}

/* Rises as log2 does; the real table comes from Python. */
static const int64_t *rising_table(void)
{
    static int64_t table[(1 << MAX_PRECISION) + 2];
    if (!table[2])
        for (int64_t number = 2, bits = 0; number < (1 << MAX_PRECISION) + 2; number++) {
            bits += number >> (bits + 1) ? 1 : 0;
            table[number] = (bits << 16) + ((number - ((int64_t)1 << bits)) << 16 >> bits);
        }
    return table;
}

int fuzz_fit(const uint8_t *data, size_t size)
{
    reader input = {data, size};
    int64_t counts[256];
    uint16_t frequency[256];
    for (int symbol = 0; symbol < 256; symbol++)
        counts[symbol] =
            (int64_t)(take(&input, 1) % 3 ? take(&input, 4) : 0) - (take(&input, 1) == 255);
    int precision = rans_fit(counts, rising_table(), frequency);
    if (precision) {
        uint32_t total = 0;
        for (int symbol = 0; symbol < 256; symbol++) {
            require((counts[symbol] > 0) == (frequency[symbol] > 0));
            total += frequency[symbol];
        }
        require(total == 1u << precision);
    }
    return 0;
}

/* Makes records whose sizes fit the slots; with `honest`, their checksums too. */
static uint8_t *make_records(reader *input, size_t chunks, size_t *slots_bytes)
{
    uint8_t *records = take_copy(input, chunks * RECORD_BYTES);
    *slots_bytes = 0;
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        uint8_t *record = records + chunk * RECORD_BYTES;
        store32(record, 1 + load32(record) % 700);
        record[4] %= 3;
        *slots_bytes += (load32(record) + SLOT_ALIGNMENT - 1) / SLOT_ALIGNMENT * SLOT_ALIGNMENT;
    }
    return records;
}

static void sign(uint8_t *records, size_t chunks, uint8_t *slots)
{
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        uint8_t *record = records + chunk * RECORD_BYTES;
        size_t stored_bytes = load32(record);
        size_t size = (stored_bytes + SLOT_ALIGNMENT - 1) / SLOT_ALIGNMENT * SLOT_ALIGNMENT;
        memset(slots + stored_bytes, 0, size - stored_bytes);
        uint64_t hash = xxh3_of_slot(slots, size);
        store32(record + 8, (uint32_t)hash);
        store32(record + 12, (uint32_t)(hash >> 32));
        slots += size;
    }
}

int fuzz_check(const uint8_t *data, size_t size)
{
    reader input = {data, size};
    size_t chunks = take(&input, 1) % 5, slots_bytes;
    int honest = (int)take(&input, 1) % 2;
    uint8_t *records = make_records(&input, chunks, &slots_bytes);
    int64_t raw_bytes[5];
    for (size_t chunk = 0; chunk < chunks; chunk++)
        raw_bytes[chunk] = (int64_t)take(&input, 2);
    uint8_t *slots = take_copy(&input, slots_bytes);
    if (honest)
        sign(records, chunks, slots);
    check_slots(slots, slots_bytes, records, raw_bytes, chunks);
    zstd_is_plain(slots, slots_bytes, chunks ? (uint64_t)raw_bytes[0] : 0);
    free(slots);
    free(records);
    return 0;
}

int fuzz_run(const uint8_t *data, size_t size)
{
    static const int itemsizes[] = {2, 2, 4, 1, 2};
    reader input = {data, size};
    tile_run run;
    memset(&run, 0, sizeof run);
    run.rows = take(&input, 1) % 40;
    run.cols = take(&input, 1) % 40;
    run.tile_rows = take(&input, 1) % 40;
    run.tile_cols = take(&input, 1) % 40;
    run.first_tile = take(&input, 1) % 4;
    run.last_tile = run.first_tile + take(&input, 1) % 4;
    run.finish = (int)take(&input, 1) % 3;
    run.target = (int)take(&input, 1) % 6;
    run.planes = 1 + (int)take(&input, 1) % (run.finish == FINISH_JOIN ? 8 : 3);
    run.itemsize = run.finish == FINISH_JOIN ? run.planes : itemsizes[run.target % 5];
    run.rotate = (int)take(&input, 1) % 2;
    run.boolean = (int)take(&input, 1) % 2;
    run.by_column = (int)take(&input, 1) % 2;
    run.checked = (int)take(&input, 1) % 2;
    int sides = (int)take(&input, 1), honest = sides >> 3 & 1;
    size_t chunks = (size_t)(run.last_tile - run.first_tile) * (size_t)run.planes, slots_bytes;
    uint8_t *records = make_records(&input, chunks, &slots_bytes), *slots, *tables;
    run.scale_count = run.by_column ? run.cols : run.rows;
    float *scales = (float *)(void *)take_copy(&input, 4 * run.scale_count);
    float *col_scales = (float *)(void *)take_copy(&input, 4 * run.cols);
    int32_t *order = (int32_t *)(void *)take_copy(&input, 4 * run.cols);
    for (size_t col = 0; col < run.cols; col++)
        order[col] = sides & 4 ? (int32_t)((uint32_t)order[col] % run.cols) : order[col];
    run.scales = scales;
    run.col_scales = sides & 1 ? col_scales : NULL;
    run.order = sides & 2 ? order : NULL;
    run.col_scale_count = run.order_count = run.cols;
    run.group_rows = take(&input, 1) % 4;
    run.group_cols = take(&input, 1) % 4;
    run.table_count = take(&input, 1) % 32;
    int64_t offsets[33];
    for (size_t number = 0; number <= run.table_count; number++)
        offsets[number] = (int64_t)take(&input, 2) - (take(&input, 1) == 255);
    run.table_offsets = offsets;
    run.tables_bytes = take(&input, 2) % 600;
    tables = take_copy(&input, run.tables_bytes);
    run.tables = sides & 16 ? tables : NULL;
    slots = take_copy(&input, slots_bytes);
    if (honest)
        sign(records, chunks, slots);
    run.slots = slots;
    run.slots_bytes = slots_bytes;
    run.records = records;
    run.out_bytes = run.rows * run.cols * (size_t)run.itemsize;
    run.out = calloc(run.out_bytes ? run.out_bytes : 1, 1);
    run.scratch_bytes = decode_run_scratch(&run);
    run.scratch = calloc(run.scratch_bytes ? run.scratch_bytes : 1, 1);
    require(run.out && run.scratch);
    decode_run(&run);
    free(run.out);
    free(run.scratch);
    free(slots);
    free(tables);
    free(order);
    free(col_scales);
    free(scales);
    free(records);
    return 0;
}

#define FUZZED_CHUNKS 6

/* What was packed has checksums that fit, and coded chunks decode to their symbols. */
static void check_packed(const packing *job, size_t slots_bytes)
{
    static rans_table table; /* 80 KiB: allocating it anew took longer than packing */
    size_t parsed = SIZE_MAX;
    uint8_t *symbols = malloc(job->symbols_bytes + 1);
    const uint8_t *slot = job->slots, *at = job->symbols;
    require(symbols != NULL);
    require(slots_fill_exactly(job->records, job->chunks, slots_bytes));
    for (size_t chunk = 0; chunk < job->chunks; chunk++) {
        const uint8_t *record = record_of(job->records, chunk);
        size_t stored_bytes = load32(record), raw_bytes = (size_t)job->raw_bytes[chunk],
               number = chunk / job->group * job->places + chunk % job->places;
        require(slot_is_sound(slot, record));
        if (record[4] == CODEC_RAW)
            require(stored_bytes == raw_bytes && !memcmp(slot, at, raw_bytes));
        if (record[4] == CODEC_RANS) {
            require(number == parsed ||
                    !rans_parse_table(job->tables + RANS_MOST_TABLE_BYTES * number,
                                      job->table_bytes[number], &table));
            parsed = number;
            require(!rans_decode(slot, stored_bytes, &table, symbols, raw_bytes));
            require(!memcmp(symbols, at, raw_bytes));
        }
        slot += slot_bytes(stored_bytes);
        at += raw_bytes;
    }
    free(symbols);
}

int fuzz_pack(const uint8_t *data, size_t size)
{
    reader input = {data, size};
    int64_t raw_bytes[FUZZED_CHUNKS];
    uint8_t *frames[FUZZED_CHUNKS];
    size_t frame_bytes[FUZZED_CHUNKS], room = 0, sum = 0, longest = 0;
    packing job;
    memset(&job, 0, sizeof job);
    job.chunks = take(&input, 1) % (FUZZED_CHUNKS + 1);
    job.places = take(&input, 1) % 4;
    job.group = take(&input, 1) % 9;
    job.codec = (int)take(&input, 1) % 4;
    int odd = (int)take(&input, 1);
    for (size_t chunk = 0; chunk < job.chunks; chunk++) {
        raw_bytes[chunk] = (int64_t)take(&input, 2) % 400 - (odd == 1);
        sum += raw_bytes[chunk] > 0 ? (size_t)raw_bytes[chunk] : 0;
        room += slot_bytes(raw_bytes[chunk] > 0 ? (size_t)raw_bytes[chunk] : 0);
        longest = (size_t)raw_bytes[chunk] > longest && raw_bytes[chunk] > 0
                      ? (size_t)raw_bytes[chunk]
                      : longest;
        frame_bytes[chunk] = take(&input, 1) % 4 ? take(&input, 2) % 400 : 0;
        frames[chunk] = frame_bytes[chunk] ? take_copy(&input, frame_bytes[chunk]) : NULL;
    }
    job.raw_bytes = raw_bytes;
    job.frames = (const uint8_t *const *)frames;
    job.frame_bytes = frame_bytes;
    job.symbols_bytes = sum + (odd == 2) - (odd == 3 && sum);
    uint8_t *symbols = take_copy(&input, job.symbols_bytes), low_bits[FUZZED_CHUNKS] = {0, 5};
    job.symbols = symbols;
    job.low_bits = odd & 16 ? low_bits : NULL;
    job.log2_table = rising_table();
    size_t tables = job.group ? tables_of(&job) : 0;
    job.fitted = calloc(tables + 1, sizeof *job.fitted);
    job.tables = malloc((tables + 1) * RANS_MOST_TABLE_BYTES);
    job.table_bytes = calloc(tables + 1, sizeof *job.table_bytes);
    job.scratch_bytes = rans_encode_bound(longest) - (odd == 4);
    job.scratch = malloc(job.scratch_bytes);
    job.slots_bytes = room - (odd == 5 && room);
    job.slots = malloc(job.slots_bytes ? job.slots_bytes : 1);
    job.records = malloc(job.chunks * RECORD_BYTES + 1);
    job.counts = malloc(job.chunks * 256 * sizeof *job.counts + 1);
    require(job.fitted && job.tables && job.table_bytes && job.scratch && job.slots &&
            job.records && job.counts);
    int64_t slots_bytes = pack_chunks(&job);
    if (slots_bytes >= 0)
        check_packed(&job, (size_t)slots_bytes);
    for (size_t chunk = 0; chunk < job.chunks; chunk++)
        free(frames[chunk]);
    free(symbols);
    free(job.fitted);
    free(job.tables);
    free(job.table_bytes);
    free(job.scratch);
    free(job.slots);
    free(job.records);
    free(job.counts);
    return 0;
}

int fuzz_rows(const uint8_t *data, size_t size)
{
    static const int itemsizes[] = {[TO_BF16] = 2, [TO_F16] = 2, [TO_F32] = 4};
    reader input = {data, size};
    int type = (int)take(&input, 1) % 3, itemsize = itemsizes[type];
    size_t rows = 1 + take(&input, 1) % 5, cols = 1 + take(&input, 1);
    uint8_t *words = take_copy(&input, rows * cols * (size_t)itemsize);
    float *absmax = malloc(rows * sizeof *absmax), worst;
    int8_t *codes = malloc(rows * cols);
    uint8_t *symbols = malloc(rows * cols * (size_t)itemsize);
    require(absmax && codes && symbols);
    if (quantize_rows(words, type, rows, cols, absmax, codes, &worst) == ROWS_FINE)
        require(worst >= 0 && !memchr(codes, -128, rows * cols));
    split_tiles(words, itemsize, (int)take(&input, 1) % 2, rows * cols, 1 + take(&input, 2),
                symbols);
    free(words);
    free(absmax);
    free(codes);
    free(symbols);
    return 0;
}

#ifdef FUZZ_TARGET
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    return FUZZ_TARGET(data, size);
}
#endif
