// SPDX-License-Identifier: Apache-2.0
// Decode attention over the paged cache: one new token per request, keys and values read once
// and in place.
//
// One work item is one (request, key/value head): its G = H / K query heads share every key
// that is read.  Keys are walked in tiles with an online softmax, so nothing of the length of
// the context is ever stored.  All arithmetic is float32; storage is float32 or bfloat16.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 64
#define MAX_GROUP 64
#define MAX_DIM 1024

typedef struct {
    const void *q;                // [B, H, D], row stride q_stride elements
    const void *k;                // [slots, K, D], contiguous
    const void *v;                // [slots, K, v_width], contiguous; the keys for latent calls
    void *out;                    // [B, H, Dv], contiguous
    const int32_t *table;         // [rows, table_stride] slot of each token
    const int32_t *rows;          // [B]
    const int32_t *lens;          // [B]
    const float *sinks;           // [H] or NULL
    int64_t q_stride, head_stride, table_stride;
    int32_t batch, heads, kv_heads, dim, value_dim, v_width;
    int32_t window, chunk;        // 0 = none
    float scale, softcap;         // softcap 0 = none
    int32_t q_bf16, kv_bf16;
} DecodeArgs;

static inline float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Rows are walked in vectors of 16 floats, which compilers lower to whatever the processor has;
// local rows are padded with zeros to whole vectors.  Every size is a constant where it matters:
// `attend` is copied once for each common head size, so that loops over a row unroll.
#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)
#define AHEAD 8  // keys to prefetch: pages lie anywhere in memory

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef float floats_8 __attribute__((vector_size(32)));
typedef float floats_4 __attribute__((vector_size(16)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));
typedef float loose_floats __attribute__((vector_size(64), aligned(4)));

INLINE float sum_of(floats x) {
    const floats_8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7)
                     + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    const floats_4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3)
                     + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

INLINE void read_row(float *restrict to, const void *from, int64_t at, int n, int bf16) {
    floats *restrict out = (floats *)to;
    const int whole = n / LANES;
    if (bf16) {
        const uint16_t *restrict p = (const uint16_t *)from + at;
        for (int i = 0; i < whole; i++)
            out[i] = (floats)(__builtin_convertvector(*(const halves *)(p + i * LANES), words) << 16);
        for (int i = whole * LANES; i < n; i++) to[i] = widen(p[i]);
    } else {
        const float *restrict p = (const float *)from + at;
        for (int i = 0; i < whole; i++) out[i] = *(const loose_floats *)(p + i * LANES);
        for (int i = whole * LANES; i < n; i++) to[i] = p[i];
    }
    for (int i = n; i < PADDED(n); i++) to[i] = 0;
}

INLINE float dot(const float *restrict a, const float *restrict b, int padded) {
    const floats *restrict x = (const floats *)a, *restrict y = (const floats *)b;
    floats sum = x[0] * y[0];
    for (int i = 1; i < padded / LANES; i++) sum += x[i] * y[i];
    return sum_of(sum);
}

// exp(x) for x <= 0 within a few ulp: 2^n · p(r) with x = n·ln 2 + r, |r| <= ln 2 / 2, and p the
// Taylor polynomial of degree 6.
INLINE floats exp_negative(floats x) {
    x = (floats)((ints)x & (x > -87.0f)) + (floats)((ints)(x * 0 - 87.0f) & (x <= -87.0f));
    const ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);  // towards zero: rounds
    const floats whole = __builtin_convertvector(n, floats);
    const floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    floats p = r * 1.3888889e-3f + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (floats)((n + 127) << 23);
}

INLINE void prefetch(const void *base, int64_t at, int n, int bf16) {
    const char *p = (const char *)base + at * (bf16 ? 2 : 4);
    for (int i = 0; i < n * (bf16 ? 2 : 4); i += 64) __builtin_prefetch(p + i);
}

// Turn the scores of one tile into weights; returns what the sums so far shrink by.
INLINE float weigh(const DecodeArgs *a, float *restrict s, int count, float *best, float *total) {
    if (a->softcap > 0)
        for (int j = 0; j < count; j++) s[j] = a->softcap * tanhf(s[j] / a->softcap);
    float top = *best;
    for (int j = 0; j < count; j++) top = s[j] > top ? s[j] : top;
    for (int j = count; j < PADDED(count); j++) s[j] = -INFINITY;
    floats sum = {0};
    for (int j = 0; j < PADDED(count); j += LANES) {
        floats *restrict v = (floats *)(s + j);
        *v = exp_negative(*v - top);
        sum += *v;
    }
    // Padding weighs exp(−87), which float32 cannot see beside the 1 of the best key.
    const floats old = {*best - top};
    const float shrink = *best == -INFINITY ? 0.0f : exp_negative(old)[0];
    *total = *total * shrink + sum_of(sum);
    *best = top;
    return shrink;
}

INLINE void attend(const DecodeArgs *a, int b, int kv, const int dim, const int vdim) {
    const int group = a->heads / a->kv_heads, pdim = PADDED(dim), pvdim = PADDED(vdim);
    const int len = a->lens[b];
    const int32_t *slots = a->table + (int64_t)a->rows[b] * a->table_stride;
    float q[group * pdim] __attribute__((aligned(64)));
    float acc[group * pvdim] __attribute__((aligned(64)));
    float row[pdim > pvdim ? pdim : pvdim] __attribute__((aligned(64)));
    float score[group * TILE] __attribute__((aligned(64)));
    float best[group], total[group];

    for (int g = 0; g < group; g++) {
        const int head = kv * group + g;
        read_row(q + g * pdim, a->q, b * a->q_stride + head * a->head_stride, dim, a->q_bf16);
        for (int i = 0; i < dim; i++) q[g * pdim + i] *= a->scale;
        best[g] = a->sinks ? a->sinks[head] : -INFINITY;
        total[g] = a->sinks ? 1.0f : 0.0f;
    }
    memset(acc, 0, sizeof acc);

    int first = 0;
    if (a->window && len > a->window) first = len - a->window;
    if (a->chunk && (len - 1) / a->chunk * a->chunk > first) first = (len - 1) / a->chunk * a->chunk;

#define KEY(j) (((int64_t)slots[j] * a->kv_heads + kv) * dim)
#define VALUE(j) (((int64_t)slots[j] * a->kv_heads + kv) * a->v_width)
    for (int start = first; start < len; start += TILE) {
        const int end = len - start < TILE ? len : start + TILE;
        for (int j = start; j < end; j++) {
            if (j + AHEAD < len) prefetch(a->k, KEY(j + AHEAD), dim, a->kv_bf16);
            read_row(row, a->k, KEY(j), dim, a->kv_bf16);
            for (int g = 0; g < group; g++)
                score[g * TILE + j - start] = dot(q + g * pdim, row, pdim);
        }
        for (int g = 0; g < group; g++) {
            const float shrink = weigh(a, score + g * TILE, end - start, best + g, total + g);
            floats *restrict sums = (floats *)(acc + g * pvdim);
            for (int i = 0; i < pvdim / LANES; i++) sums[i] *= shrink;
        }
        for (int j = start; j < end; j++) {
            if (j + AHEAD < len) prefetch(a->v, VALUE(j + AHEAD), vdim, a->kv_bf16);
            read_row(row, a->v, VALUE(j), vdim, a->kv_bf16);
            for (int g = 0; g < group; g++) {
                const float weight = score[g * TILE + j - start];
                floats *restrict sums = (floats *)(acc + g * pvdim), *restrict v = (floats *)row;
                for (int i = 0; i < pvdim / LANES; i++) sums[i] += weight * v[i];
            }
        }
    }

    for (int g = 0; g < group; g++) {
        const float norm = total[g] > 0 ? 1.0f / total[g] : 0.0f;
        const int64_t at = ((int64_t)b * a->heads + kv * group + g) * vdim;
        for (int i = 0; i < vdim; i++) {
            const float y = acc[g * pvdim + i] * norm;
            if (a->q_bf16) ((uint16_t *)a->out)[at + i] = narrow(y);
            else ((float *)a->out)[at + i] = y;
        }
    }
}

static void attend_item(const DecodeArgs *a, int b, int kv) {
    const int dim = a->dim;
    if (dim != a->value_dim) attend(a, b, kv, dim, a->value_dim);
    else if (dim == 64) attend(a, b, kv, 64, 64);
    else if (dim == 128) attend(a, b, kv, 128, 128);
    else if (dim == 256) attend(a, b, kv, 256, 256);
    else attend(a, b, kv, dim, dim);
}

// Returns 0, or 1 when the sizes exceed what the stack buffers hold.
int bedplate_decode_attention(const DecodeArgs *a) {
    if (a->heads / a->kv_heads > MAX_GROUP || a->dim > MAX_DIM || a->value_dim > MAX_DIM) return 1;
    const int items = a->batch * a->kv_heads;
#pragma omp parallel for schedule(dynamic, 1) if (items > 1)
    for (int item = 0; item < items; item++) attend_item(a, item / a->kv_heads, item % a->kv_heads);
    return 0;
}
