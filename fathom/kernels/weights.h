// Weights as they are, float32 or bfloat16, in panels: the layouts and the reasons are in kernels.cpp.

#pragma once

#include <vector>

#include "lanes.h"

namespace {

// Each kind of weight has: `of`, itself from addresses; `Rows`, the activations as it wants them; `panel<C>`, the sums of
// C rows with one panel; `at`, the same weights further on by whole matrices; `ready`, the same weights as all tiles of M
// rows should read panel p (two panels that are read in turns differ in SLOT).

template <typename T>
struct PlainRows {
    std::vector<const T*> rows;
    PlainRows(const T* x, long ldx, long M, long, const int32_t* chosen = nullptr, long divisor = 1) : rows(M) {
        for (long m = 0; m < M; m++) rows[m] = x + (chosen ? chosen[m] / divisor : m) * ldx;
    }
};

struct FloatWeights {
    using Rows = PlainRows<float>;
    const float* w;
    long K;

    static FloatWeights of(const void* w, const void*, long K) { return {(const float*)w, K}; }
    template <int SLOT = 0>
    const FloatWeights& ready(long, long) const { return *this; }
    FloatWeights at(long outputs) const { return {w + (outputs + PANEL - 1) / PANEL * PANEL * K, K}; }

    template <int C>
    void panel(const Rows& x, long m, long p, f32v out[C][2]) const {
        f32v acc[C][2];
        for (int c = 0; c < C; c++) acc[c][0] = acc[c][1] = splat(0);
        const float* weights = w + p * PANEL * K;
        for (long k = 0; k < K; k++, weights += PANEL) {
            f32v w0 = load(weights), w1 = load(weights + LANES);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                float value = x.rows[m + c][k];
                acc[c][0] += w0 * value;
                acc[c][1] += w1 * value;
            }
        }
        for (int c = 0; c < C; c++) out[c][0] = acc[c][0], out[c][1] = acc[c][1];
    }
};

// acc += even * even + odd * odd, with the pair of activations in all lanes.
inline f32v dot_pair(f32v acc, u32v weights, int32_t pair) {
#if defined(__AVX512BF16__)
    return (f32v)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(pair));
#else
    f32v even = (f32v)(weights << 16), odd = (f32v)(weights & 0xffff0000);
    return acc + even * widen(bf16(pair)) + odd * widen(bf16(uint32_t(pair) >> 16));
#endif
}

inline f32v dot_pair(f32v acc, const bf16* weights, int32_t pair) {
    u32v both;
    std::memcpy(&both, weights, 64);
    return dot_pair(acc, both, pair);
}

// out[c] = sum over k < K of rows[c][k] * panel[k], 32 numbers each. Pairs of a row lie STEP apart.
template <int C, long STEP = 2>
inline void multiply(const bf16* const* rows, const bf16* panel, long K, f32v out[C][2]) {
    f32v acc[C][2];
    const bf16* row[C];
    for (int c = 0; c < C; c++) row[c] = rows[c], acc[c][0] = acc[c][1] = splat(0);
    for (long k = 0; k < K; k += 2, panel += 2 * PANEL) {
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            int32_t pair;
            std::memcpy(&pair, row[c] + k / 2 * STEP, 4);
            acc[c][0] = dot_pair(acc[c][0], panel, pair);
            acc[c][1] = dot_pair(acc[c][1], panel + 2 * LANES, pair);
        }
    }
    for (int c = 0; c < C; c++) out[c][0] = acc[c][0], out[c][1] = acc[c][1];
}

struct Bf16Weights {
    using Rows = PlainRows<bf16>;
    const bf16* w;
    long K;

    static Bf16Weights of(const void* w, const void*, long K) { return {(const bf16*)w, K}; }
    template <int SLOT = 0>
    const Bf16Weights& ready(long, long) const { return *this; }
    Bf16Weights at(long outputs) const { return {w + (outputs + PANEL - 1) / PANEL * PANEL * K, K}; }

    template <int C>
    void panel(const Rows& x, long m, long p, f32v out[C][2]) const {
        multiply<C>(x.rows.data() + m, w + p * PANEL * K, K, out);
    }
};

}  // namespace
