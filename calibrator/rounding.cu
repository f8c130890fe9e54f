// Rounds a panel of columns with error feedback; one thread a row. The bits are those of
// rounding.py's round_by_columns: every product, sum and quotient is rounded by itself.

constexpr int PANEL = 64;

extern "C" __global__ void round_panel(const float *weights, const float *shifted,
                                       const float *row_scale, const float *col_scale,
                                       const float *ratios, const float *deadzone, float *errors,
                                       short *codes, int rows, int columns, int stride, int lowest,
                                       int highest)
{
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows)
        return;
    const float scale = row_scale[row], dead = *deadzone;
    float own[PANEL];
    for (int col = 0; col < columns; ++col) {
        const float *ratio = ratios + (long long)col * stride;
        const long long place = (long long)col * rows + row;
        float value = shifted[place];
        for (int before = 0; before < col; ++before)
            value = __fadd_rn(value, __fmul_rn(ratio[before], own[before]));
        const float step = __fmul_rn(scale, col_scale[col]);
        float code = __fdiv_rn(value, step);
        code = rintf(__fsub_rn(code, copysignf(dead, code)));
        code = fminf(fmaxf(code, (float)lowest), (float)highest);
        codes[place] = (short)code;
        own[col] = __fsub_rn(weights[place], __fmul_rn(code, step));
        errors[place] = own[col];
    }
}
