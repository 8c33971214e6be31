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

// Every size below is a constant where it matters: `attend` is copied once for each common head
// size, so that the compiler keeps whole rows in registers and drops the loops' ends.
#define INLINE static inline __attribute__((always_inline))

INLINE void read_row(float *restrict to, const void *from, int64_t at, int n, int bf16) {
    if (bf16) {
        const uint16_t *restrict p = (const uint16_t *)from + at;
        for (int i = 0; i < n; i++) to[i] = widen(p[i]);
    } else {
        const float *restrict p = (const float *)from + at;
        for (int i = 0; i < n; i++) to[i] = p[i];
    }
}

INLINE float dot(const float *restrict a, const float *restrict b, int n) {
    float sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// exp(x) for x <= 0 within 2 ulp, without a call, so that a loop over it becomes vectors:
// 2^n · p(r) with x = n·ln 2 + r, |r| <= ln 2 / 2, and p the Taylor polynomial of degree 6.
INLINE float exp_negative(float x) {
    x = x > -87.0f ? x : -87.0f;
    const float n = __builtin_rintf(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

INLINE void attend(const DecodeArgs *a, int b, int kv, const int dim, const int vdim) {
    const int group = a->heads / a->kv_heads;
    const int len = a->lens[b];
    const int32_t *slots = a->table + (int64_t)a->rows[b] * a->table_stride;
    float q[group * dim], acc[group * vdim], best[group], total[group];
    float row[dim > vdim ? dim : vdim], score[group * TILE];

    for (int g = 0; g < group; g++) {
        const int head = kv * group + g;
        read_row(q + g * dim, a->q, b * a->q_stride + head * a->head_stride, dim, a->q_bf16);
        for (int i = 0; i < dim; i++) q[g * dim + i] *= a->scale;
        best[g] = a->sinks ? a->sinks[head] : -INFINITY;
        total[g] = a->sinks ? 1.0f : 0.0f;
        for (int i = 0; i < vdim; i++) acc[g * vdim + i] = 0;
    }

    int first = 0;
    if (a->window && len > a->window) first = len - a->window;
    if (a->chunk && (len - 1) / a->chunk * a->chunk > first) first = (len - 1) / a->chunk * a->chunk;

    for (int start = first; start < len; start += TILE) {
        const int count = len - start < TILE ? len - start : TILE;
        for (int j = 0; j < count; j++) {
            read_row(row, a->k, ((int64_t)slots[start + j] * a->kv_heads + kv) * dim, dim, a->kv_bf16);
            for (int g = 0; g < group; g++) score[g * TILE + j] = dot(q + g * dim, row, dim);
        }
        for (int g = 0; g < group; g++) {
            float *s = score + g * TILE, top = best[g];
            if (a->softcap > 0)
                for (int j = 0; j < count; j++) s[j] = a->softcap * tanhf(s[j] / a->softcap);
            for (int j = 0; j < count; j++) top = s[j] > top ? s[j] : top;
            const float shrink = best[g] == -INFINITY ? 0.0f : exp_negative(best[g] - top);
            float sum = 0;
            for (int j = 0; j < count; j++) { s[j] = exp_negative(s[j] - top); sum += s[j]; }
            total[g] = total[g] * shrink + sum;
            best[g] = top;
            if (shrink != 1.0f)
                for (int i = 0; i < vdim; i++) acc[g * vdim + i] *= shrink;
        }
        for (int j = 0; j < count; j++) {
            read_row(row, a->v, ((int64_t)slots[start + j] * a->kv_heads + kv) * a->v_width, vdim, a->kv_bf16);
            for (int g = 0; g < group; g++) {
                const float p = score[g * TILE + j];
                float *restrict to = acc + g * vdim;
                for (int i = 0; i < vdim; i++) to[i] += p * row[i];
            }
        }
    }

    for (int g = 0; g < group; g++) {
        const float norm = total[g] > 0 ? 1.0f / total[g] : 0.0f;
        const int64_t at = ((int64_t)b * a->heads + kv * group + g) * vdim;
        for (int i = 0; i < vdim; i++) {
            const float y = acc[g * vdim + i] * norm;
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
