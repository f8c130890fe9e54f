/* A run of tiles from its slots to its place: check, decode, and join planes or dequantize (SPEC.md
 * 5 to 7). */
#include "core.h"

typedef struct {
    uint64_t row, col, rows, cols;
} rectangle;

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static uint64_t divide_up(uint64_t a, uint64_t b)
{
    return a / b + (a % b != 0);
}

static rectangle tile_at(const tile_run *run, uint64_t index)
{
    uint64_t across = divide_up(run->cols, run->tile_cols);
    rectangle tile = {index / across * run->tile_rows, index % across * run->tile_cols, 0, 0};
    tile.rows = least(run->tile_rows, run->rows - tile.row);
    tile.cols = least(run->tile_cols, run->cols - tile.col);
    return tile;
}

/* ---- sizes
 *
 */

#define MOST_ELEMENTS ((uint64_t)1 << 47)
#define MOST_SYMBOLS ((uint64_t)1 << 32)

static uint64_t tile_symbols(const tile_run *run)
{
    return least(run->tile_rows, run->rows) * least(run->tile_cols, run->cols);
}

static int is_possible(const tile_run *run)
{
    if (run->rows < 1 || run->cols < 1 || run->tile_rows < 1 || run->tile_cols < 1)
        return 0;
    if (run->rows > MOST_ELEMENTS || run->cols > MOST_ELEMENTS ||
        run->rows > MOST_ELEMENTS / run->cols)
        return 0;
    if (run->tile_rows > UINT32_MAX || run->tile_cols > UINT32_MAX ||
        tile_symbols(run) > MOST_SYMBOLS)
        return 0;
    uint64_t tiles = divide_up(run->rows, run->tile_rows) * divide_up(run->cols, run->tile_cols);
    return run->planes >= 1 && run->planes <= MAX_PLANES && run->first_tile <= run->last_tile &&
           run->last_tile <= tiles && run->last_tile - run->first_tile <= UINT32_MAX / MAX_PLANES;
}

/* Scratch: symbols of each plane of two tiles, one row of 16-bit codes, one of elements, one of
 * factors. */
static size_t row_scratch(const tile_run *run)
{
    return (size_t)(least(run->tile_cols, run->cols) + 15) / 16 * 16 *
           (sizeof(float) + 4 + sizeof(int16_t));
}

static size_t plane_scratch(const tile_run *run)
{
    return (size_t)(tile_symbols(run) + 63) / 64 * 64;
}

size_t decode_run_scratch(const tile_run *run)
{
    if (!is_possible(run))
        return 0;
    return sizeof(rans_table) + 2 * (size_t)run->planes * plane_scratch(run) + row_scratch(run) +
           64;
}

static int sides_fit(const tile_run *run)
{
    if (run->finish == FINISH_JOIN)
        return run->planes == run->itemsize && (run->itemsize == 1 || run->itemsize == 2 ||
                                                run->itemsize == 4 || run->itemsize == 8);
    static const int itemsizes[] = {2, 2, 4, 1, 2};
    if (run->finish != FINISH_DEQUANTIZE || run->planes > 2 || run->target < TO_BF16 ||
        run->target > TO_I16)
        return 0;
    if (run->itemsize != itemsizes[run->target] || (run->target == TO_I8 && run->planes != 1) ||
        (run->target == TO_I16 && run->planes != 2))
        return 0;
    if (run->scale_count != (run->by_column ? run->cols : run->rows))
        return 0;
    if (run->col_scales && (run->by_column || run->col_scale_count != run->cols))
        return 0;
    if (!run->order)
        return 1;
    if (!run->col_scales || run->order_count != run->cols)
        return 0;
    for (size_t col = 0; col < run->order_count; col++)
        if (run->order[col] < 0 || (uint64_t)run->order[col] >= run->cols)
            return 0;
    return 1;
}

static int tables_fit(const tile_run *run)
{
    if (!run->tables)
        return 1;
    if (run->group_rows < 1 || run->group_cols < 1)
        return 0;
    uint64_t down = divide_up(run->rows, run->tile_rows),
             across = divide_up(run->cols, run->tile_cols);
    uint64_t groups = divide_up(down, run->group_rows) * divide_up(across, run->group_cols);
    return run->table_count == groups * (uint64_t)run->planes;
}

/* ---- one chunk
 *
 */

typedef struct {
    const tile_run *run;
    rans_table *table;
    uint64_t table_number; /* of the table in `table`; UINT64_MAX at first */
    uint8_t *plane[2][MAX_PLANES];
    int16_t *codes;
    uint8_t *elements;
    float *factors;
} workplace;

/* Returns the number of the table of a tile's plane. */
static uint64_t table_of(const tile_run *run, uint64_t tile, int plane)
{
    uint64_t across = divide_up(run->cols, run->tile_cols);
    uint64_t group = tile / across / run->group_rows * divide_up(across, run->group_cols) +
                     tile % across / run->group_cols;
    return group * (uint64_t)run->planes + (uint64_t)plane;
}

static int read_table(workplace *at, uint64_t number)
{
    const tile_run *run = at->run;
    if (number == at->table_number)
        return 0;
    if (number >= run->table_count)
        return -1;
    int64_t begin = run->table_offsets[number], end = run->table_offsets[number + 1];
    if (begin < 0 || end < begin || (uint64_t)end > run->tables_bytes)
        return -1;
    at->table_number = UINT64_MAX;
    if (rans_parse_table(run->tables + begin, (size_t)(end - begin), at->table))
        return -1;
    at->table_number = number;
    return 0;
}

/* Checks a chunk and finds its symbols where they need no decoder here; -1 where it is wrong. Those
 * of codec rans stay NULL. */
static int open_chunk(const tile_run *run, size_t chunk, const uint8_t *slot, size_t symbols,
                      const uint8_t **opened)
{
    const uint8_t *record = record_of(run->records, chunk);
    *opened = NULL;
    if (!run->checked && !slot_is_sound(slot, record))
        return -1;
    if (run->given && run->given[chunk]) {
        *opened = run->given[chunk];
        return run->given_bytes[chunk] == symbols ? 0 : -1;
    }
    if (record[4] == CODEC_RAW) {
        *opened = slot;
        return load32(record) == symbols ? 0 : -1;
    }
    return record[4] == CODEC_RANS && run->tables ? 0 : -1;
}

typedef struct {
    uint64_t index;
    rectangle place;
    size_t chunk; /* its first one, in the run */
    const uint8_t *slot[MAX_PLANES];
    const uint8_t *symbols[MAX_PLANES];
} tile_work;

static rans_chunk coded_chunk(const workplace *at, const tile_work *tile, int plane,
                              uint8_t *symbols)
{
    size_t stored_bytes = load32(record_of(at->run->records, tile->chunk + (size_t)plane));
    rans_chunk chunk = {tile->slot[plane], stored_bytes, symbols,
                        (size_t)(tile->place.rows * tile->place.cols)};
    return chunk;
}

/* Decodes one plane of one or two tiles; returns the chunk that is wrong, or -1. */
static int64_t decode_plane(workplace *at, tile_work tile[2], int count, int plane)
{
    const tile_run *run = at->run;
    rans_chunk coded[2];
    int waiting = 0;
    for (int number = 0; number < count; number++) {
        tile_work *one = &tile[number];
        size_t chunk = one->chunk + (size_t)plane,
               symbols = (size_t)(one->place.rows * one->place.cols);
        if (open_chunk(run, chunk, one->slot[plane], symbols, &one->symbols[plane]))
            return (int64_t)chunk;
        coded[number] = coded_chunk(at, one, plane, at->plane[number][plane]);
        waiting += !one->symbols[plane];
    }
    if (waiting == 2 &&
        table_of(run, tile[0].index, plane) == table_of(run, tile[1].index, plane)) {
        if (read_table(at, table_of(run, tile[0].index, plane)) ||
            rans_decode_pair(coded, at->table))
            return (int64_t)tile[0].chunk + plane;
        tile[0].symbols[plane] = coded[0].symbols;
        tile[1].symbols[plane] = coded[1].symbols;
        return -1;
    }
    for (int number = 0; number < count; number++) {
        tile_work *one = &tile[number];
        if (one->symbols[plane])
            continue;
        if (read_table(at, table_of(run, one->index, plane)) ||
            rans_decode(coded[number].stored, coded[number].stored_bytes, at->table,
                        coded[number].symbols, coded[number].raw_bytes))
            return (int64_t)one->chunk + plane;
        one->symbols[plane] = coded[number].symbols;
    }
    return -1;
}

/* ---- placing a tile
 *
 */

static uint8_t *place_of(const tile_run *run, uint64_t row, uint64_t col)
{
    return run->out + (row * run->cols + col) * (uint64_t)run->itemsize;
}

static int join_tile(const workplace *at, const rectangle *tile,
                     const uint8_t *const symbols[MAX_PLANES])
{
    const tile_run *run = at->run;
    const kernel_set *set = kernels();
    size_t count = (size_t)tile->cols, pieces = (size_t)tile->rows;
    if (tile->cols == run->cols) {
        count *= pieces;
        pieces = 1;
    }
    for (size_t piece = 0; piece < pieces; piece++) {
        const uint8_t *plane[MAX_PLANES] = {NULL};
        for (int number = 0; number < run->planes; number++)
            plane[number] = symbols[number] + piece * count;
        for (size_t i = 0; run->boolean && i < count; i++)
            if (plane[0][i] > 1)
                return -1;
        set->join(plane, run->planes, run->rotate, count,
                  place_of(run, tile->row + piece, tile->col));
    }
    return 0;
}

static void scatter(const workplace *at, const rectangle *tile, uint64_t row)
{
    const tile_run *run = at->run;
    const int32_t *order = run->order + tile->col;
    uint8_t *out = place_of(run, row, 0);
    size_t count = (size_t)tile->cols;
    if (run->itemsize == 1) {
        for (size_t i = 0; i < count; i++)
            out[order[i]] = at->elements[i];
    } else if (run->itemsize == 2) {
        for (size_t i = 0; i < count; i++)
            memcpy(out + 2 * (size_t)order[i], at->elements + 2 * i, 2);
    } else {
        for (size_t i = 0; i < count; i++)
            memcpy(out + 4 * (size_t)order[i], at->elements + 4 * i, 4);
    }
}

/* Returns the factors of the columns of a tile, in the stored order, or NULL. */
static const float *factors_of(const workplace *at, const rectangle *tile)
{
    const tile_run *run = at->run;
    if (run->by_column)
        return run->scales + tile->col;
    if (!run->col_scales)
        return NULL;
    if (!run->order)
        return run->col_scales + tile->col;
    for (uint64_t col = 0; col < tile->cols; col++)
        at->factors[col] = run->col_scales[run->order[tile->col + col]];
    return at->factors;
}

static int dequantize_tile(const workplace *at, const rectangle *tile,
                           const uint8_t *const symbols[MAX_PLANES], int low_bits)
{
    const tile_run *run = at->run;
    const kernel_set *set = kernels();
    size_t count = (size_t)tile->cols;
    const float *factors = factors_of(at, tile);
    if (set->has_lowest((const int8_t *)symbols[run->planes - 1],
                        (size_t)(tile->rows * tile->cols)))
        return -1;
    if (run->planes == 2 && (low_bits < 1 || low_bits > 8))
        return -1;
    for (uint64_t row = 0; row < tile->rows; row++) {
        const int8_t *low = (const int8_t *)symbols[0] + row * count;
        float scale = run->by_column ? 1.0f : run->scales[tile->row + row];
        uint8_t *out = run->order ? at->elements : place_of(run, tile->row + row, tile->col);
        if (run->target == TO_I8) {
            memcpy(out, low, count);
        } else if (run->planes == 1) {
            set->dequantize8(low, count, scale, factors, run->target, out);
        } else {
            int16_t *codes = run->target == TO_I16 ? (int16_t *)(void *)out : at->codes;
            set->widen(low, (const int8_t *)symbols[1] + row * count, low_bits, count, codes);
            if (run->target != TO_I16)
                set->dequantize16(codes, count, scale, factors, run->target, out);
        }
        if (run->order)
            scatter(at, tile, tile->row + row);
    }
    return 0;
}

static void lay_out(const tile_run *run, workplace *at)
{
    uint8_t *scratch = run->scratch + (64 - (uintptr_t)run->scratch % 64) % 64;
    size_t width = (size_t)(least(run->tile_cols, run->cols) + 15) / 16 * 16;
    at->run = run;
    at->table_number = UINT64_MAX;
    /* Widths are multiples of 16, so that all of these are aligned for their types. */
    at->factors = (float *)(void *)scratch;
    at->elements = scratch + 4 * width;
    at->codes = (int16_t *)(void *)(scratch + 8 * width);
    scratch += 10 * width;
    at->table = (rans_table *)(void *)scratch;
    scratch += sizeof(rans_table);
    for (int number = 0; number < 2 * run->planes; number++)
        at->plane[number % 2][number / 2] = scratch + (size_t)number * plane_scratch(run);
}

int64_t decode_run(const tile_run *run)
{
    size_t scratch = decode_run_scratch(run);
    if (!scratch || run->scratch_bytes < scratch || !sides_fit(run) || !tables_fit(run))
        return -2;
    if ((uint64_t)run->out_bytes != run->rows * run->cols * (uint64_t)run->itemsize ||
        (uintptr_t)run->out % (uintptr_t)run->itemsize)
        return -2;
    size_t chunks = (size_t)(run->last_tile - run->first_tile) * (size_t)run->planes;
    if (!slots_fill_exactly(run->records, chunks, run->slots_bytes))
        return -2;
    workplace at;
    lay_out(run, &at);
    const uint8_t *slot = run->slots;
    size_t chunk = 0;
    for (uint64_t index = run->first_tile; index < run->last_tile;) {
        tile_work tile[2];
        int count = run->last_tile - index > 1 ? 2 : 1;
        for (int number = 0; number < count; number++, index++) {
            tile[number].index = index;
            tile[number].place = tile_at(run, index);
            tile[number].chunk = chunk;
            for (int plane = 0; plane < run->planes; plane++, chunk++) {
                tile[number].slot[plane] = slot;
                slot += slot_bytes(load32(record_of(run->records, chunk)));
            }
        }
        for (int plane = 0; plane < run->planes; plane++) {
            int64_t wrong = decode_plane(&at, tile, count, plane);
            if (wrong >= 0)
                return wrong;
        }
        for (int number = 0; number < count; number++) {
            size_t last = tile[number].chunk + (size_t)run->planes - 1;
            int low_bits = run->planes == 2 ? record_of(run->records, last)[5] : 0;
            if (run->finish == FINISH_JOIN
                    ? join_tile(&at, &tile[number].place, tile[number].symbols)
                    : dequantize_tile(&at, &tile[number].place, tile[number].symbols, low_bits))
                return (int64_t)last;
        }
    }
    return -1;
}
