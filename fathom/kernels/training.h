// Products of training: whole batches of rows, weights that change at every step, gradients of both factors.
//
// A weight is rounded to bfloat16 and packed twice, by rows for x Wᵀ and by columns for dy W. The gradient dW = dyᵀ x sums
// over rows; there, blocks of rows are laid side by side in pairs, x in panels of PANEL columns and dy in strips of ROWS,
// which makes it the same loop again with strips in the place of rows. Its sums are float32.
//
// Rows come in groups, one for each matrix of a stack (the experts): group e lies before ends[e] and behind group e - 1,
// and an index may say where each of its rows is to be read. A single matrix is a stack of one.
//
// Threads share nothing that one of them has just written: a packed matrix that another core fetches costs more than packing
// it again (measured: 40 % of the time of a gradient).

#pragma once

#include "products.h"

namespace {

constexpr long ROW_BLOCK = 256;   // rows that stay in the cache while all panels pass
constexpr long ROW_CHUNK = 1024;  // rows of a group for which one thread packs the matrix
constexpr long SUM_BLOCK = 512;   // rows that are laid side by side at a time
constexpr long AHEAD = 8;         // rows that are asked for before their turn

inline void prefetch(const bf16* row, long width) {
    for (long i = 0; i < width; i += 2 * LANES) __builtin_prefetch(row + i);
}

inline u32v bits_of(const bf16* p) {
    u16v half;
    std::memcpy(&half, p, 32);
    return __builtin_convertvector(half, u32v);
}

inline u32v bits_of(const float* p) {
    bf16 half[LANES];
    store(half, load(p));
    return bits_of(half);
}

// Up to LANES neighbours of two rows in pairs; what is missing (a null row, or columns from `count` on) is zero.
template <typename T>
inline u32v pairs(const T* even, const T* odd, long count) {
    T filled[2][LANES] = {};
    if (count < LANES) {
        std::copy_n(even, count, filled[0]);
        if (odd) std::copy_n(odd, count, filled[1]);
        even = filled[0], odd = filled[1];
    }
    return bits_of(even) | (odd ? bits_of(odd) << 16 : u32v{});
}

// Room that lasts: fresh memory would cost more than what is done in it.
template <int WHICH>
uint32_t* scratch(size_t size) {
    static thread_local std::vector<u32v> room;
    if (room.size() * LANES < size) room.resize(size / LANES + 1);
    return (uint32_t*)room.data();
}

// w [N, K] -> [N / PANEL][K / 2][PANEL] for x Wᵀ: outputs side by side, pairs along K (even).
template <typename T>
inline void pack_rows(const T* w, uint32_t* panels, long N, long K) {
    uint32_t* rounded = scratch<2>(PANEL * K / 2);
    for (long n = 0; n < N; n += PANEL, panels += PANEL * K / 2) {
        for (long i = 0; i < PANEL; i++) {
            bf16* to = (bf16*)rounded + i * K;
            const T* row = w + (n + i) * K;
            if (n + i >= N) std::fill_n(to, K, bf16(0));
            else
                for (long k = 0; k < K; k += LANES) {
                    if (k + LANES <= K) store(to + k, load(row + k));
                    else for (long j = k; j < K; j++) to[j] = narrow(to_float(row[j]));
                }
        }
        for (long j = 0; j < K / 2; j++)
            for (long i = 0; i < PANEL; i++) panels[j * PANEL + i] = rounded[i * K / 2 + j];
    }
}

// w [N, K] -> [K / PANEL][N / 2][PANEL] for dy W: inputs side by side, pairs along N (even). A few panels at a time, so that
// memory is read in long stretches and not too many are written at once.
template <typename T>
inline void pack_columns(const T* w, uint32_t* panels, long N, long K) {
    constexpr long WIDE = 4 * PANEL;
    long filled = (K + PANEL - 1) / PANEL * PANEL;
    for (long begin = 0; begin < filled; begin += WIDE)
        for (long n = 0; n < N; n += 2)
            for (long k = begin; k < std::min(begin + WIDE, filled); k += LANES) {
                const T* row = w + n * K + k;
                u32v both = k < K ? pairs(row, row + K, std::min(LANES, K - k)) : u32v{};
                std::memcpy(panels + (k / PANEL * N + n) / 2 * PANEL + k % PANEL, &both, 64);
            }
}

// Rows of a matrix, as an index finds them.
struct Source {
    const bf16* x;
    long stride;
    const int32_t* at = nullptr;
    const bf16* operator[](long m) const { return x + (at ? at[m] : m) * stride; }
};

// Rows of one group for which one thread packs its matrix.
struct Piece { long e, begin, end; };

inline std::vector<Piece> pieces_of_groups(const int32_t* ends, long E) {
    std::vector<Piece> found;
    for (long e = 0; e < E; e++)
        for (long m = e ? ends[e - 1] : 0; m < ends[e]; m += ROW_CHUNK)
            found.push_back({e, m, std::min(m + ROW_CHUNK, long(ends[e]))});
    return found;
}

// y[m] = W_e x[m], or W_eᵀ x[m] if `columns`, for the rows m of each group e.
template <typename T>
void grouped(Source x, const int32_t* ends, long E, const T* w, long N, long K, bool columns, bf16* y) {
    long outputs = columns ? K : N, inputs = columns ? N : K, count = (outputs + PANEL - 1) / PANEL;
    std::vector<Piece> items = pieces_of_groups(ends, E);
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < items.size(); i++) {
        auto [e, begin, end] = items[i];
        uint32_t* panels = scratch<0>(count * PANEL * inputs / 2);
        if (columns) pack_columns(w + e * N * K, panels, N, K);
        else pack_rows(w + e * N * K, panels, N, K);
        Bf16Weights matrix{(const bf16*)panels, inputs};
        for (long m0 = begin; m0 < end; m0 += ROW_BLOCK) {
            long rows = std::min(ROW_BLOCK, end - m0);
            Bf16Weights::Rows block(x.at ? x.x : x[m0], x.stride, rows, inputs, x.at ? x.at + m0 : nullptr);
            for (long p = 0; p < count; p++)
                tiles(rows, [&](long m, auto tile) {
                    constexpr int C = decltype(tile)::value;
                    f32v out[C][2];
                    matrix.template panel<C>(block, m, p, out);
                    put_tile<C>(out, p, outputs, [&](int c) { return y + (m0 + m + c) * outputs; });
                });
        }
    }
}

// dw[e, n, k] = sum over the rows m of group e of dy[m, n] * x[m, k].
void weight_gradient(Source dy, Source x, const int32_t* ends, long E, float* dw, long N, long K) {
    constexpr long PAIRS = SUM_BLOCK / 2;
    long panels = (K + PANEL - 1) / PANEL, strips = (N + LANES - 1) / LANES * (LANES / ROWS);
    // A group's columns of x are divided where there are too few groups for the threads.
    long parts = std::min(panels, (8 * omp_get_max_threads() + E - 1) / E);
#pragma omp parallel for schedule(dynamic)
    for (long item = 0; item < E * parts; item++) {
        long e = item / parts, first = e ? ends[e - 1] : 0, last = ends[e];
        long from = panels * (item % parts) / parts, to = panels * (item % parts + 1) / parts;
        long left = from * PANEL, right = std::min(K, to * PANEL);
        uint32_t *x_pairs = scratch<0>((to - from) * PAIRS * PANEL), *dy_pairs = scratch<1>(strips * PAIRS * ROWS);
        if (first == last)
            for (long n = 0; n < N; n++) std::fill(dw + (e * N + n) * K + left, dw + (e * N + n) * K + right, 0.0f);
        for (long m0 = first; m0 < last; m0 += SUM_BLOCK) {
            long rows = std::min(SUM_BLOCK, last - m0), count = (rows + 1) / 2;
            for (long j = 0; j < count; j++) {
                for (long m = 2 * j + AHEAD; m < std::min(rows, 2 * j + AHEAD + 2); m++) {
                    prefetch(x[m0 + m] + left, right - left);
                    prefetch(dy[m0 + m], N);
                }
                bool both = 2 * j + 1 < rows;
                const bf16 *even = x[m0 + 2 * j], *odd = both ? x[m0 + 2 * j + 1] : nullptr;
                for (long k = left; k < right; k += LANES) {
                    u32v pair = pairs(even + k, odd ? odd + k : odd, std::min(LANES, K - k));
                    std::memcpy(x_pairs + (k / PANEL - from) * PAIRS * PANEL + j * PANEL + k % PANEL, &pair, 64);
                }
                even = dy[m0 + 2 * j], odd = both ? dy[m0 + 2 * j + 1] : nullptr;
                for (long n = 0; n < N; n += LANES) {
                    u32v pair = pairs(even + n, odd ? odd + n : odd, std::min(LANES, N - n));
                    for (long half = 0; half < LANES / ROWS; half++)
                        std::memcpy(dy_pairs + ((n / ROWS + half) * PAIRS + j) * ROWS, (uint32_t*)&pair + half * ROWS, 4 * ROWS);
                }
            }
            for (long p = from; p < to; p++)
                for (long n = 0; n < N; n += ROWS) {
                    const bf16* strip[ROWS];
                    for (int c = 0; c < ROWS; c++) strip[c] = (const bf16*)(dy_pairs + n * PAIRS + c);
                    f32v sums[ROWS][2];
                    multiply<ROWS, 2 * ROWS>(strip, (const bf16*)(x_pairs + (p - from) * PAIRS * PANEL), 2 * count, sums);
                    for (int c = 0; c < ROWS && n + c < N; c++)
                        for (int half = 0; half < 2; half++) {
                            long k = p * PANEL + half * LANES, width = std::min(LANES, K - k);
                            float* sum = dw + (e * N + n + c) * K + k;
                            bool more = m0 > first;
                            if (width == LANES) store(sum, more ? load(sum) + sums[c][half] : sums[c][half]);
                            else for (long i = 0; i < width; i++) sum[i] = (more ? sum[i] : 0.0f) + sums[c][half][i];
                        }
                }
        }
    }
}

}  // namespace
