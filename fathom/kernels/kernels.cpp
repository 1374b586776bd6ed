// Kernels for a CPU. Most of all for decoding, few rows of activations against all of the weights; `training.h` and
// `causal.h` have those of training, which are the same loop with other things in the place of weights.
//
// Theory
// ------
// One decoded token reads every weight once, so a step cannot be faster than (bytes of weights) / (memory bandwidth).
// With many rows it cannot be faster than the processor's multipliers. Both limits are met by one loop over weights
// that were packed beforehand: a *panel* holds PANEL outputs, and lies in memory in the order in which it is multiplied,
//
//     bfloat16   [N / PANEL][K / 2][PANEL][2]        float32   [N / PANEL][K][PANEL]
//     int8       [N / PANEL][K / 4][PANEL][4], one bfloat16 scale per output and 64 inputs: [N / PANEL][K / 64][PANEL]
//     float8     [N / PANEL][K / 2][4][2][4][2], one float32 scale per panel and 128 inputs: [N / PANEL][K / 128]
//
// (N is filled up with zeros.) A lane of a register is an output, an activation is broadcast to all lanes, and up to
// ROWS rows share what was loaded. So one row reads memory in a straight line, and many rows run near the multipliers'
// peak; nothing is ever summed across lanes.
//
// **Every output is one chain of additions along K**, whatever else is in the batch: a row's result is the same to the
// bit alone, among 64, and in a long prompt. That is what lets a served text not depend on who else is being served.
//
// int8 weights meet activations that are rounded to int8 in the same blocks of 64 on the way in. Weights are kept as
// value + 128 because the processor multiplies unsigned by signed bytes; 128 times the sum of a block's activations is
// what every chain starts below zero with.
//
// float8 weights (e4m3, in DeepSeek's blocks of 128 x 128) meet bfloat16 activations: a code becomes the bfloat16 that
// equals it, by table, on its way into the registers, and the sum over a block is multiplied by the block's scale. Half
// the bytes are read, and only the weights were rounded. Outputs of a pair of inputs lie crosswise, eight bytes from each
// half of a panel in turn, because that is how bytes are unpacked. Many rows read a panel widened once for all of them.
//
// Attention reads pages of PAGE tokens, so that requests can share them.

#include "causal.h"
#include "drawing.h"
#include "latent.h"
#include "pointwise.h"
#include "softmax.h"
#include "tiles.h"

extern "C" {

// Ends the threads that wait for this thread's next parallel loop. They count as busy: with more of them than cores, all
// of a program's loops stop waiting actively, and every one of a decoding step's hundreds begins with a system call.
void fathom_release_threads() { omp_pause_resource_all(omp_pause_soft); }

#define FATHOM_PRODUCTS(NAME, T, WEIGHTS)                                                                                \
    void fathom_linear_##NAME(const T* x, long ldx, const void* w, const void* scales, const T* bias, T* y, long M,      \
                              long N, long K) {                                                                          \
        linear(WEIGHTS::Rows(x, ldx, M, K), WEIGHTS::of(w, scales, K), bias, y, M, N);                                   \
    }                                                                                                                    \
    void fathom_linear_wide_##NAME(const T* x, long ldx, const void* w, const void* scales, const T* bias, float* y,     \
                                   long M, long N, long K) {                                                             \
        linear(WEIGHTS::Rows(x, ldx, M, K), WEIGHTS::of(w, scales, K), bias, y, M, N);                                   \
    }                                                                                                                    \
    void fathom_swiglu_##NAME(const T* x, long ldx, const void* w, const void* scales, T* y, long M, long I, long K) {   \
        swiglu(WEIGHTS::Rows(x, ldx, M, K), WEIGHTS::of(w, scales, K), y, M, I);                                         \
    }                                                                                                                    \
    void fathom_experts_##NAME(const T* x, const int32_t* order, const int32_t* ends, const float* weights,              \
                               const void* gate_up, const void* gate_up_scales, const void* down,                        \
                               const void* down_scales, T* hidden, float* parts, T* y, long tokens, long slots,          \
                               long count, long D, long I) {                                                             \
        experts(x, order, ends, weights, WEIGHTS::of(gate_up, gate_up_scales, D), WEIGHTS::of(down, down_scales, I),     \
                hidden, parts, y, tokens, slots, count, D, I);                                                           \
    }                                                                                                                    \
    void fathom_dense_layers_##NAME(T* x, const DenseLayer<T>* layers, const float* cos, const float* sin,               \
                                    const int64_t* places, const int32_t* tables, const int32_t* visible, long tokens,   \
                                    long count, long hidden, long heads, long groups, long head, long inner,             \
                                    long table_width, float scale, float eps) {                                          \
        DenseShape shape{tokens, count, hidden, heads, groups, head, inner, table_width};                                \
        dense_layers<WEIGHTS>(x, layers, shape, cos, sin, places, tables, visible, scale, eps);                          \
    }

FATHOM_PRODUCTS(bf16, bf16, Bf16Weights)
FATHOM_PRODUCTS(f32, float, FloatWeights)
FATHOM_PRODUCTS(int8, bf16, Int8Weights)
FATHOM_PRODUCTS(fp8, bf16, Fp8Weights)

void fathom_heads_linear_bf16(const bf16* x, long head_stride, const bf16* w, bf16* y, long tokens, long heads, long N,
                              long K) {
    heads_linear(x, head_stride * heads, Bf16Weights{w, K}, y, tokens, heads, N, K);
}
void fathom_heads_linear_f32(const float* x, long head_stride, const float* w, float* y, long tokens, long heads, long N,
                             long K) {
    heads_linear(x, head_stride * heads, FloatWeights{w, K}, y, tokens, heads, N, K);
}

#define FATHOM_FOR_TYPE(T, NAME)                                                                                          \
    void fathom_paged_attention_##NAME(const T* q, const T* keys, const T* values, T* out, const int32_t* tables,         \
                                       const int32_t* visible, long tokens, long heads, long groups, long key_width,      \
                                       long value_width, long key_page, long value_page, long key_token,                  \
                                       long value_token, long table_width, float scale) {                                 \
        paged_attention(q, keys, values, out, tables, visible, tokens, heads, groups, key_width, value_width, key_page,   \
                        value_page, key_token, value_token, table_width, scale);                                          \
    }                                                                                                                     \
    void fathom_write_pages_##NAME(const T* rows, long stride, T* pages, const int64_t* places, long tokens, long groups, \
                                   long width) {                                                                          \
        write_pages(rows, stride, pages, places, tokens, groups, width);                                                  \
    }                                                                                                                     \
    void fathom_rms_norm_##NAME(const T* x, long ldx, const float* weight, T* y, long M, long D, float eps) {             \
        rms_norm(x, ldx, weight, y, M, D, eps);                                                                           \
    }                                                                                                                     \
    void fathom_rotate_##NAME(const T* x, long ldx, long head_stride, const float* cos, const float* sin, T* y, long M,   \
                              long heads, long half, int interleaved) {                                                   \
        rotate(x, ldx, head_stride, cos, sin, y, M, heads, half, interleaved != 0);                                       \
    }                                                                                                                     \
    void fathom_rms_norm_backward_##NAME(const T* dy, const T* x, const float* weight, T* dx, float* dweight, long M,     \
                                         long D, float eps) {                                                             \
        rms_norm_backward(dy, x, weight, dx, dweight, M, D, eps);                                                         \
    }                                                                                                                     \
    void fathom_gated_##NAME(const T* gate, const T* up, T* y, long count) { gated(gate, up, y, count); }                 \
    void fathom_gated_backward_##NAME(const T* dy, const T* gate, const T* up, T* dgate, T* dup, long count) {            \
        gated_backward(dy, gate, up, dgate, dup, count);                                                                  \
    }

void fathom_draw_rows(const float* logits, const float* inverse, const double* uniforms, float* sums, int64_t* ids, long R,
                      long V) {
    draw_rows(logits, inverse, uniforms, sums, ids, R, V);
}
void fathom_log_sum_exp(const float* logits, const float* inverse, float* sums, double* log_sums, long R, long V) {
    log_sum_exp(logits, inverse, sums, log_sums, R, V);
}
void fathom_softmax_rows(const float* logits, const int64_t* targets, float* logprobs, float* entropies, float* totals,
                         bf16* chances, long R, long V, float inverse) {
    softmax_rows(logits, inverse, {targets, logprobs, entropies, totals, chances}, R, V);
}
void fathom_softmax_gradients(const bf16* chances, const int64_t* rows, const int64_t* targets, const float* totals,
                              const float* logprobs, const float* factors, bf16* gradients, long count, long V) {
    softmax_gradients(chances, rows, targets, totals, logprobs, factors, gradients, count, V);
}

void fathom_grouped_f32(const bf16* x, const int32_t* at, const int32_t* ends, long E, const float* w, long N, long K,
                        int columns, bf16* y) {
    grouped({x, columns ? N : K, at}, ends, E, w, N, K, columns != 0, y);
}
void fathom_grouped_bf16(const bf16* x, const int32_t* at, const int32_t* ends, long E, const bf16* w, long N, long K,
                         int columns, bf16* y) {
    grouped({x, columns ? N : K, at}, ends, E, w, N, K, columns != 0, y);
}
void fathom_weight_gradient(const bf16* dy, const int32_t* dy_at, const bf16* x, const int32_t* x_at, const int32_t* ends,
                            long E, float* dw, long N, long K) {
    weight_gradient({dy, N, dy_at}, {x, K, x_at}, ends, E, dw, N, K);
}

#define FATHOM_TILES(T, NAME)                                                                                              \
    void fathom_tile_rows_##NAME(const T* x, long ldx, long M, long K, int power_of_two, uint8_t* codes, float* scales,    \
                                 int64_t* bad) {                                                                           \
        *bad = tile_rows(x, ldx, M, K, power_of_two != 0, codes, scales);                                                  \
    }                                                                                                                      \
    void fathom_tile_columns_##NAME(const T* x, const float*, long ldx, const int32_t* at, const int32_t* ends, long E,    \
                                    long K, int power_of_two, uint8_t* codes, float* scales, int64_t* bad) {               \
        *bad = tile_columns(Numbers<T>{x, ldx, at}, ends, E, K, power_of_two != 0, codes, scales);                         \
    }                                                                                                                      \
    void fathom_tile_blocks_##NAME(const T* w, long E, long N, long K, uint8_t* codes, float* scales,                      \
                                   int64_t* bad) {                                                                         \
        *bad = tile_blocks(w, E, N, K, codes, scales);                                                                     \
    }                                                                                                                      \
    void fathom_pack12_##NAME(const T* x, long ldx, long M, long K, uint8_t* packed, float* scales, int64_t* bad) {        \
        *bad = pack12(x, ldx, M, K, packed, scales);                                                                       \
    }

FATHOM_TILES(bf16, bf16)
FATHOM_TILES(float, f32)

void fathom_tile_columns_fp8(const uint8_t* x, const float* x_scales, long, const int32_t* at, const int32_t* ends, long E,
                             long K, int power_of_two, uint8_t* codes, float* scales, int64_t* bad) {
    *bad = tile_columns(Scaled{x, x_scales, K, at}, ends, E, K, power_of_two != 0, codes, scales);
}
void fathom_untile_rows(const uint8_t* codes, const float* scales, long M, long K, bf16* y) {
    untile_rows({codes, scales, K, nullptr}, M, y);
}
void fathom_unpack12(const uint8_t* packed, const float* scales, long M, long K, bf16* y) {
    unpack12(packed, scales, M, K, y);
}
void fathom_scaled_grouped(const uint8_t* x, const float* x_scales, const int32_t* at, const int32_t* ends, long E,
                           const uint8_t* w, const float* w_scales, long N, long K, int columns, bf16* y) {
    scaled_grouped({x, x_scales, columns ? N : K, at}, ends, E, w, w_scales, N, K, columns != 0, y);
}
void fathom_scaled_weight_gradient(const uint8_t* dy, const float* dy_scales, const uint8_t* x, const float* x_scales,
                                   const int32_t* ends, long E, float* dw, long N, long K) {
    scaled_weight_gradient({dy, dy_scales, N, nullptr}, {x, x_scales, K, nullptr}, ends, E, dw);
}

void fathom_write_latents(const bf16* rows, long stride, uint8_t* pages, const int64_t* places, long tokens, long latent,
                          long rope) {
    write_latents(rows, stride, {latent, rope}, pages, places, tokens);
}
void fathom_read_latents(const uint8_t* pages, const int64_t* owned, long count, long latent, long rope, bf16* out) {
    read_latents(pages, owned, count, {latent, rope}, out);
}
void fathom_latent_attention(const bf16* q, const uint8_t* pages, bf16* out, const int32_t* tables, const int32_t* visible,
                             long tokens, long heads, long latent, long rope, long table_width, float scale) {
    latent_attention(q, pages, {latent, rope}, out, tables, visible, tokens, heads, table_width, scale);
}

void fathom_causal_forward(const Heads* q, const Heads* k, const Heads* v, const Heads* o, float* log_sums,
                           const CausalShape* shape, float scale) {
    causal_forward(*q, *k, *v, *o, log_sums, *shape, scale);
}
void fathom_causal_backward(const Heads* d_o, const Heads* q, const Heads* k, const Heads* v, const float* log_sums,
                            const Heads* dq, const Heads* dk, const Heads* dv, const CausalShape* shape, float scale) {
    causal_backward(*d_o, *q, *k, *v, log_sums, *dq, *dk, *dv, *shape, scale);
}

FATHOM_FOR_TYPE(bf16, bf16)
FATHOM_FOR_TYPE(float, f32)
}
