// Products with packed weights of any kind: how tiles of rows meet panels.

#pragma once

#include <type_traits>

#include "quantised.h"

namespace {

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

// Panel p of C rows of N outputs to where row(c) says that they begin.
template <int C, typename Row>
inline void put_tile(const f32v out[C][2], long p, long N, Row&& row) {
    for (int c = 0; c < C; c++)
        for (int half = 0; half < 2; half++) {
            long n = p * PANEL + half * LANES;
            put(row(c) + n, out[c][half], N - n);
        }
}

// y[m, n] = x[m] . w[n] + bias[n]
template <typename Weights, typename T, typename Out>
void linear(const typename Weights::Rows& x, Weights w, const T* bias, Out* y, long M, long N) {
#pragma omp parallel
    {
        long begin, end;
        my_share((N + PANEL - 1) / PANEL, 1, begin, end);
        for (long p = begin; p < end; p++) {
            auto&& ready = w.template ready<>(p, M);
            tiles(M, [&](long m, auto count) {
                constexpr int C = decltype(count)::value;
                f32v out[C][2];
                ready.template panel<C>(x, m, p, out);
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
}

// y[m, n] = silu(gate[n] . x[m]) * (up[n] . x[m]) for the panels [begin, end); gate and up panels take turns.
template <typename Weights, typename T>
inline void gated(const typename Weights::Rows& x, Weights w, T* y, long M, long I, long begin, long end) {
    for (long p = begin; p < end; p++) {
        auto&& gates = w.template ready<0>(2 * p, M);
        auto&& ups = w.template ready<1>(2 * p + 1, M);
        tiles(M, [&](long m, auto count) {
            constexpr int C = decltype(count)::value;
            f32v gate[C][2], up[C][2];
            gates.template panel<C>(x, m, 2 * p, gate);
            ups.template panel<C>(x, m, 2 * p + 1, up);
            for (int c = 0; c < C; c++)
                for (int half = 0; half < 2; half++) {
                    long n = p * PANEL + half * LANES;
                    put(y + (m + c) * I + n, silu(gate[c][half]) * up[c][half], I - n);
                }
        });
    }
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
            for (long p = begin; p < end; p++) {
                auto&& ready = matrix.template ready<>(p, chosen);
                tiles(chosen, [&](long m, auto tile) {
                    constexpr int C = decltype(tile)::value;
                    f32v out[C][2];
                    ready.template panel<C>(rows, m, p, out);
                    put_tile<C>(out, p, D, [&](int c) { return parts + order[first + m + c] * D; });
                });
            }
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
