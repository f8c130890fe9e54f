// Kernels that run before and after a product. Behind tile.cu.

// Adds up the sums of blocks that share columns, in order; then as `packed_linear` ends.
extern "C" __global__ void __launch_bounds__(256) finish_splits(
    const float* split_sums, const float* scale, const u16* bias, u16* out, int splits, int tokens, int rows) {
    for (int index = blockIdx.x * 256 + threadIdx.x; index < tokens * rows; index += gridDim.x * 256) {
        const int row = index % rows;
        float value = 0.0f;
        for (int split = 0; split < splits; ++split) value += split_sums[(i64)split * tokens * rows + index];
        if (scale != 0) value *= scale[row];
        if (bias != 0) value += from_16_bits(bias[row]);
        out[index] = to_16_bits(value);
    }
}

// Writes inputs * col_scale, rounded once, as [tokens, cols] and, where by_column != 0, as [cols, 8, token_tiles] (`Sixteen`) with
// zeros for the tokens beyond the last.  col_scale == 0: the inputs themselves, and scaled is not written.
extern "C" __global__ void __launch_bounds__(256) prepare_inputs(
    const u16* inputs, const float* col_scale, u16* scaled, u16* by_column, int tokens, int cols, int token_tiles) {
    for (int index = blockIdx.x * 256 + threadIdx.x; index < token_tiles * cols; index += gridDim.x * 256) {
        const int tile = index / cols, column = index % cols;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const bool present = 8 * tile + k < tokens;
            const i64 place = (i64)(8 * tile + k) * cols + column;
            u16 value = present ? inputs[place] : 0;
            if (col_scale != 0 && present) scaled[place] = value = to_16_bits(from_16_bits(value) * col_scale[column]);
            if (by_column != 0) by_column[((i64)column * 8 + k) * token_tiles + tile] = value;
        }
    }
}

// Writes inputs * col_scale, rounded once, as `packed_groups` takes them; by_column as `prepare_inputs` does. Both for each block
// of 8 * token_tiles tokens.
//
// prepared: [blocks of tokens, column tiles, 4 steps, 2, tokens, 8]: the columns of step s, half h are 16 t + 4 s + 2 h and the
// next one, for t = 0 ... 3 (layout.py). Tokens and columns beyond the last are zero.
extern "C" __global__ void __launch_bounds__(256) prepare_groups(
    const u16* inputs, const float* col_scale, uint4* prepared, u16* by_column, int tokens, int cols, int token_tiles) {
    launch_dependents();
    const int width = 8 * token_tiles, pieces = (cols + 63) / 64 * 8, count = (tokens + width - 1) / width * width * pieces;
    for (int index = blockIdx.x * 256 + threadIdx.x; index < count; index += gridDim.x * 256) {
        const int local = index % width, piece = index / width % pieces, block = index / width / pieces;
        const int token = block * width + local, first = 64 * (piece >> 3) + 4 * (piece >> 1 & 3) + 2 * (piece & 1);
        u32 pairs[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const int column = first + 16 * t;
            pairs[t] = 0;
            if (column >= cols) continue;
            if (token < tokens) {
                pairs[t] = *(const u32*)(inputs + (i64)token * cols + column);
                if (col_scale != 0) {
                    const float low = from_16_bits((u16)pairs[t]) * col_scale[column];
                    const float high = from_16_bits((u16)(pairs[t] >> 16)) * col_scale[column + 1];
                    pairs[t] = to_16_bits(low) | (u32)to_16_bits(high) << 16;
                }
            }
            if (by_column != 0) {
                u16* place = by_column + ((i64)block * cols + column) * width + local % 8 * token_tiles + local / 8;
                place[0] = (u16)pairs[t];
                place[width] = (u16)(pairs[t] >> 16);
            }
        }
        prepared[index] = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
}
