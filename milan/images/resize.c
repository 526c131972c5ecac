/* The two passes of a resize, in integers: what takes the time of milan/images/resize.py, which
   says what they compute. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#define BITS 22 /* of a weight, behind the point */
#define HALF (1 << (BITS - 1))

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx2", "default")))
#else
#define FAST
#endif

/* The weights of one direction: each output takes `taps` inputs from first[output] on. */
typedef struct {
    int32_t inputs, outputs, taps;
    const int32_t *first, *weights; /* [outputs], [outputs][taps] */
} pass;

/* Red, green, blue and nothing: of a pixel in one row, and of the same pixel in another row. */
typedef int32_t pair __attribute__((vector_size(32)));

FAST static void across(const uint8_t *a, const uint8_t *b, const pass *p, pair *wide,
                        uint8_t *out_a, uint8_t *out_b) {
    for (int x = 0; x < p->inputs; x++, a += 3, b += 3)
        wide[x] = (pair){a[0], a[1], a[2], 0, b[0], b[1], b[2], 0};
    const int32_t *weights = p->weights;
    for (int x = 0; x < p->outputs; x++, weights += p->taps, out_a += 3, out_b += 3) {
        pair sum = {HALF, HALF, HALF, HALF, HALF, HALF, HALF, HALF};
        for (int i = 0; i < p->taps; i++)
            sum += wide[p->first[x] + i] * weights[i];
        sum >>= BITS;
        sum &= ~(sum >> 31);      /* 0 where it is below */
        sum |= (255 - sum) >> 31; /* all ones where it is above 255 */
        for (int c = 0; c < 3; c++) {
            out_a[c] = (uint8_t)sum[c];
            out_b[c] = (uint8_t)sum[4 + c];
        }
    }
}

FAST static void down(const uint8_t *in, ptrdiff_t stride, int length, const int32_t *weights,
                      int taps, int32_t *sums, uint8_t *out) {
    for (int x = 0; x < length; x++)
        sums[x] = HALF;
    for (int i = 0; i < taps; i++, in += stride)
        for (int x = 0; x < length; x++)
            sums[x] += weights[i] * in[x];
    for (int x = 0; x < length; x++) {
        int32_t sum = sums[x] >> BITS;
        out[x] = (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
    }
}

static void all_across(const uint8_t *in, ptrdiff_t stride, int rows, const pass *p, pair *wide,
                       uint8_t *out) {
    ptrdiff_t length = 3 * (ptrdiff_t)p->outputs;
    for (int y = 0; y < rows; y += 2) {
        int other = y + (y + 1 < rows);
        across(in + y * stride, in + other * stride, p, wide, out + y * length,
               out + other * length);
    }
}

static void all_down(const uint8_t *in, ptrdiff_t stride, int length, const pass *p, int32_t *sums,
                     uint8_t *out) {
    for (int y = 0; y < p->outputs; y++)
        down(in + p->first[y] * stride, stride, length, p->weights + (ptrdiff_t)y * p->taps,
             p->taps, sums, out + (ptrdiff_t)y * length);
}

/* `in`: y->inputs rows of x->inputs pixels, `stride` bytes apart. `out`: y->outputs rows of
   x->outputs pixels. Returns 1 if there is no memory. */
int milan_resize(const uint8_t *in, ptrdiff_t stride, const pass *x, const pass *y,
                   int down_first, uint8_t *out) {
    int length = 3 * (down_first ? x->inputs : x->outputs);
    int rows = down_first ? y->outputs : y->inputs;
    pair *wide = aligned_alloc(sizeof(pair), sizeof(pair) * (size_t)x->inputs);
    uint8_t *between = malloc((size_t)rows * (size_t)length);
    int32_t *sums = malloc(sizeof(int32_t) * (size_t)length);
    int failed = !wide || !between || !sums;
    if (!failed && down_first) {
        all_down(in, stride, length, y, sums, between);
        all_across(between, length, rows, x, wide, out);
    } else if (!failed) {
        all_across(in, stride, rows, x, wide, between);
        all_down(between, length, length, y, sums, out);
    }
    free(wide);
    free(between);
    free(sums);
    return failed;
}
