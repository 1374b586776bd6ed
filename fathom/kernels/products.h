// Products with packed weights: the layouts and the reasons are in kernels.cpp.

#pragma once

#include <type_traits>
#include <vector>

#include "lanes.h"

namespace {

// Each kind of weight has: `Rows`, the activations as it wants them; `panel<C>`, the sums of C rows with one panel;
// `at`, the same weights further on by whole matrices.

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
inline f32v dot_pair(f32v acc, const bf16* weights, int32_t pair) {
#if defined(__AVX512BF16__)
    return (f32v)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(weights), (__m512bh)_mm512_set1_epi32(pair));
#else
    u32v both;
    std::memcpy(&both, weights, 64);
    return acc + (f32v)(both << 16) * widen(bf16(pair)) + (f32v)(both & 0xffff0000) * widen(bf16(uint32_t(pair) >> 16));
#endif
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

    Bf16Weights at(long outputs) const { return {w + (outputs + PANEL - 1) / PANEL * PANEL * K, K}; }

    template <int C>
    void panel(const Rows& x, long m, long p, f32v out[C][2]) const {
        multiply<C>(x.rows.data() + m, w + p * PANEL * K, K, out);
    }
};

// Activations in blocks of 64: values, scale, and 128 times their sum.
struct Int8Rows {
    std::vector<int8_t> values;
    std::vector<float> scales;
    std::vector<int32_t> excess;

    Int8Rows(const bf16* x, long ldx, long M, long K, const int32_t* chosen = nullptr, long divisor = 1)
        : values(M * K), scales(M * K / BLOCK), excess(M * K / BLOCK) {
        for (long m = 0; m < M; m++) {
            const bf16* row = x + (chosen ? chosen[m] / divisor : m) * ldx;
            for (long b = 0; b < K / BLOCK; b++) {
                long place = m * (K / BLOCK) + b;
                round_block(row + b * BLOCK, values.data() + m * K + b * BLOCK, scales[place], excess[place]);
            }
        }
    }

    static void round_block(const bf16* x, int8_t* rounded, float& scale, int32_t& sum) {
        f32v v[4], top = splat(0);
        for (int i = 0; i < 4; i++) {
            v[i] = load(x + i * LANES);
            top = max(top, max(v[i], -v[i]));
        }
        float largest = 0;
        for (int i = 0; i < LANES; i++) largest = std::max(largest, top[i]);
        scale = largest / 127.0f;
        float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        i32v total = i32v{};
        for (int i = 0; i < 4; i++) {
            f32v shifted = v[i] * inverse + 12582912.0f;  // 1.5 * 2^23: rounds to nearest even
            i32v whole = (i32v)shifted - 0x4B400000;
            total += whole;
            for (int j = 0; j < LANES; j++) rounded[i * LANES + j] = int8_t(whole[j]);
        }
        sum = 0;
        for (int i = 0; i < LANES; i++) sum += 128 * total[i];
    }
};

// acc += four products of unsigned weights with signed activations per lane.
inline i32v dot_four(i32v acc, const uint8_t* weights, int32_t four) {
#if defined(__AVX512VNNI__)
    return (i32v)_mm512_dpbusd_epi32((__m512i)acc, _mm512_loadu_si512(weights), _mm512_set1_epi32(four));
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) acc[i] += int32_t(weights[4 * i + j]) * int8_t(uint32_t(four) >> 8 * j);
    return acc;
#endif
}

struct Int8Weights {
    using Rows = Int8Rows;
    const uint8_t* w;
    const bf16* scales;
    long K;

    Int8Weights at(long outputs) const {
        long filled = (outputs + PANEL - 1) / PANEL * PANEL;
        return {w + filled * K, scales + filled * (K / BLOCK), K};
    }

    template <int C>
    void panel(const Rows& x, long m, long p, f32v out[C][2]) const {
        f32v acc[C][2];
        for (int c = 0; c < C; c++) acc[c][0] = acc[c][1] = splat(0);
        const uint8_t* weights = w + p * PANEL * K;
        const bf16* scale = scales + p * PANEL * (K / BLOCK);
        for (long b = 0; b < K / BLOCK; b++, scale += PANEL) {
            i32v whole[C][2];
            for (int c = 0; c < C; c++)
                whole[c][0] = whole[c][1] = i32v{} - x.excess[(m + c) * (K / BLOCK) + b];
            for (long k = 0; k < BLOCK; k += 4, weights += 4 * PANEL) {
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) {
                    int32_t four;
                    std::memcpy(&four, x.values.data() + (m + c) * K + b * BLOCK + k, 4);
                    whole[c][0] = dot_four(whole[c][0], weights, four);
                    whole[c][1] = dot_four(whole[c][1], weights + 4 * LANES, four);
                }
            }
            f32v s0 = load(scale), s1 = load(scale + LANES);
            for (int c = 0; c < C; c++) {
                float row_scale = x.scales[(m + c) * (K / BLOCK) + b];
                acc[c][0] += __builtin_convertvector(whole[c][0], f32v) * (s0 * row_scale);
                acc[c][1] += __builtin_convertvector(whole[c][1], f32v) * (s1 * row_scale);
            }
        }
        for (int c = 0; c < C; c++) out[c][0] = acc[c][0], out[c][1] = acc[c][1];
    }
};

// visit(C) for the tiles that M rows fall into, C a constant of the compiler's.
template <int C, typename Visit>
inline void last_tile(long rest, Visit&& visit) {
    if constexpr (C > 0) {
        if (rest == C) visit(std::integral_constant<int, C>{});
        else last_tile<C - 1>(rest, visit);
    }
}

template <typename Visit>
inline void tiles(long M, Visit&& visit) {
    long m = 0;
    for (; m + ROWS <= M; m += ROWS) visit(m, std::integral_constant<int, ROWS>{});
    last_tile<ROWS - 1>(M - m, [&](auto C) { visit(m, C); });
}

template <typename T>
inline void put(T* y, f32v v, long count) {  // the first `count` lanes
    if (count >= LANES) return store(y, v);
    for (long i = 0; i < count; i++) assign(y[i], v[i]);
}

// y[m, n] = x[m] . w[n] + bias[n]
template <typename Weights, typename T, typename Out>
void linear(const typename Weights::Rows& x, Weights w, const T* bias, Out* y, long M, long N) {
#pragma omp parallel
    {
        long begin, end;
        my_share((N + PANEL - 1) / PANEL, 1, begin, end);
        for (long p = begin; p < end; p++)
            tiles(M, [&](long m, auto count) {
                constexpr int C = decltype(count)::value;
                f32v out[C][2];
                w.template panel<C>(x, m, p, out);
                for (int c = 0; c < C; c++)
                    for (int half = 0; half < 2; half++) {
                        long n = p * PANEL + half * LANES;
                        f32v v = out[c][half];
                        if (bias)
                            for (long i = 0; i < LANES && n + i < N; i++) v[i] += to_float(bias[n + i]);
                        put(y + (m + c) * N + n, v, N - n);
                    }
            });
    }
}

// y[m, n] = silu(gate[n] . x[m]) * (up[n] . x[m]) for the panels [begin, end); gate and up panels take turns.
template <typename Weights, typename T>
inline void gated(const typename Weights::Rows& x, Weights w, T* y, long M, long I, long begin, long end) {
    for (long p = begin; p < end; p++)
        tiles(M, [&](long m, auto count) {
            constexpr int C = decltype(count)::value;
            f32v gate[C][2], up[C][2];
            w.template panel<C>(x, m, 2 * p, gate);
            w.template panel<C>(x, m, 2 * p + 1, up);
            for (int c = 0; c < C; c++)
                for (int half = 0; half < 2; half++) {
                    long n = p * PANEL + half * LANES;
                    put(y + (m + c) * I + n, silu(gate[c][half]) * up[c][half], I - n);
                }
        });
}

template <typename Weights, typename T>
void swiglu(const typename Weights::Rows& x, Weights w, T* y, long M, long I) {
#pragma omp parallel
    {
        long begin, end;
        my_share((I + PANEL - 1) / PANEL, 1, begin, end);
        gated(x, w, y, M, I, begin, end);
    }
}

// y[t] = sum over the token's choices of weight * down_e(silu(gate_e x) * up_e x). `order` lists the choices (token *
// slots + slot) by expert, expert e's between ends[e - 1] and ends[e]; `hidden` [choices, I] and `parts` [choices, D]
// are scratch. The sum runs over slots in order, so that it does not depend on how choices are sorted.
template <typename Weights, typename T>
void experts(const T* x, const int32_t* order, const int32_t* ends, const float* weights, Weights gate_up, Weights down,
             T* hidden, float* parts, T* y, long tokens, long slots, long count, long D, long I) {
    long inner_panels = (I + PANEL - 1) / PANEL, outer_panels = (D + PANEL - 1) / PANEL;
#pragma omp parallel
    {
        long begin, end;
        my_share(inner_panels, 1, begin, end);
        for (long e = 0; e < count; e++) {
            long first = e ? ends[e - 1] : 0, chosen = ends[e] - first;
            if (chosen == 0) continue;
            typename Weights::Rows rows(x, D, chosen, D, order + first, slots);
            gated(rows, gate_up.at(2 * inner_panels * PANEL * e), hidden + first * I, chosen, I, begin, end);
        }
#pragma omp barrier
        my_share(outer_panels, 1, begin, end);
        for (long e = 0; e < count; e++) {
            long first = e ? ends[e - 1] : 0, chosen = ends[e] - first;
            if (chosen == 0) continue;
            typename Weights::Rows rows(hidden + first * I, I, chosen, I);
            Weights matrix = down.at(outer_panels * PANEL * e);
            for (long p = begin; p < end; p++)
                tiles(chosen, [&](long m, auto tile) {
                    constexpr int C = decltype(tile)::value;
                    f32v out[C][2];
                    matrix.template panel<C>(rows, m, p, out);
                    for (int c = 0; c < C; c++)
                        for (int half = 0; half < 2; half++) {
                            long n = p * PANEL + half * LANES;
                            put(parts + order[first + m + c] * D + n, out[c][half], D - n);
                        }
                });
        }
#pragma omp barrier
#pragma omp for
        for (long t = 0; t < tokens; t++)
            for (long d = 0; d < D; d++) {
                float total = 0;
                for (long k = 0; k < slots; k++) total += weights[t * slots + k] * parts[(t * slots + k) * D + d];
                assign(y[t * D + d], total);
            }
    }
}

}  // namespace
