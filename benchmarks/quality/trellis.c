/* The path of an entropy-coded trellis with 8 states, and feedback of its errors over columns.

   Integers are split into four subsets by their last two bits. An even state allows subsets 0 and
   2, an odd one 1 and 3; the subset decides the next state. So a decoder knows the last bit of an
   integer before it reads it: one bit less for each. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { STATES = 8 };
static const int SUBSET[STATES][2] = {{0, 2}, {1, 3}, {2, 0}, {3, 1},
                                      {2, 0}, {3, 1}, {0, 2}, {1, 3}};
static const int NEXT[STATES][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7},
                                    {0, 1}, {2, 3}, {4, 5}, {6, 7}};

/* Finds integers n that minimise the sum of (x - n)^2 + price * n^2 over a path from state 0.
   `best` and `from` are scratch of 8 * length entries; `coset` receives the last bit that each
   state prescribes. Returns the sum. */
double trellis_path(const float *x, long length, float price, int32_t *codes, uint8_t *coset,
                    int32_t *best, uint8_t *from) {
  float cost[STATES], next_cost[STATES];
  double total = 0;
  for (int s = 0; s < STATES; s++) cost[s] = s ? 1e30f : 0.0f;
  for (long at = 0; at < length; at++) {
    int nearest[4];
    float price_of[4];
    for (int d = 0; d < 4; d++) {
      float near = 4.0f * nearbyintf((x[at] - d) * 0.25f) + d;
      float smaller = near > 0 ? near - 4.0f : near + 4.0f;
      float a = (x[at] - near) * (x[at] - near) + price * near * near;
      float b = (x[at] - smaller) * (x[at] - smaller) + price * smaller * smaller;
      nearest[d] = (int)(b < a ? smaller : near);
      price_of[d] = b < a ? b : a;
    }
    for (int s = 0; s < STATES; s++) next_cost[s] = 1e38f;
    for (int s = 0; s < STATES; s++)
      for (int k = 0; k < 2; k++) {
        int d = SUBSET[s][k], to = NEXT[s][k];
        float sum = cost[s] + price_of[d];
        if (sum < next_cost[to]) {
          next_cost[to] = sum;
          best[at * STATES + to] = nearest[d];
          from[at * STATES + to] = (uint8_t)s;
        }
      }
    float least = next_cost[0];
    for (int s = 1; s < STATES; s++)
      if (next_cost[s] < least) least = next_cost[s];
    total += least;
    for (int s = 0; s < STATES; s++) cost[s] = next_cost[s] - least;
  }
  int state = 0;
  for (int s = 1; s < STATES; s++)
    if (cost[s] < cost[state]) state = s;
  for (long at = length - 1; at >= 0; at--) {
    codes[at] = best[at * STATES + state];
    state = from[at * STATES + state];
    coset[at] = (uint8_t)(state & 1);
  }
  return total;
}

/* Quantizes `cols` columns of `rows` weights, a path down each. Before a column is quantized it
   gets the errors of those before it times ratios[column, earlier] (row-major, cols x cols).
   targets, weights, errors, codes, coset: [cols, rows]; targets is overwritten. Returns 0 where
   memory ran out. */
int trellis_panel(float *targets, const float *weights, const float *ratios, float *errors,
                  const float *row_steps, const float *col_steps, const float *prices,
                  int32_t *codes, uint8_t *coset, long cols, long rows) {
  float *x = malloc(rows * sizeof *x);
  int32_t *best = malloc(rows * STATES * sizeof *best);
  uint8_t *from = malloc(rows * STATES);
  int done = x && best && from;
  for (long c = 0; done && c < cols; c++) {
    float *target = targets + c * rows;
    for (long i = 0; i < c; i++)
      for (long r = 0; r < rows; r++) target[r] += ratios[c * cols + i] * errors[i * rows + r];
    for (long r = 0; r < rows; r++) x[r] = target[r] / (row_steps[r] * col_steps[c]);
    trellis_path(x, rows, prices[c], codes + c * rows, coset + c * rows, best, from);
    for (long r = 0; r < rows; r++)
      errors[c * rows + r] = weights[c * rows + r] - codes[c * rows + r] * row_steps[r] * col_steps[c];
  }
  free(x), free(best), free(from);
  return done;
}

/* Gives symbols m of rows x cols their last bits, as a decoder would: n = 2 m + last bit. `state`
   has the state of each column, 0 before the first row. */
void trellis_last_bits(const int8_t *restrict m, int8_t *restrict n, uint8_t *restrict state,
                       long rows, long cols) {
  for (long row = 0; row < rows; row++)
    for (long col = 0; col < cols; col++) {
      uint8_t s = state[col], code = (uint8_t)(2 * (uint8_t)m[row * cols + col] + (s & 1));
      uint8_t branch = ((code >> 1) ^ (s >> 1) ^ (s >> 2)) & 1;
      state[col] = (uint8_t)((2 * s + branch) & 7);
      n[row * cols + col] = (int8_t)code;
    }
}
