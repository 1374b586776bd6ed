// Drawing tokens from rows of logits, and what a softmax's denominator is.

#pragma once

#include "lanes.h"

namespace {

constexpr long DRAWN_TOGETHER = 64;  // logits whose probabilities are summed before any is looked at alone

// e^((logits - largest) * inverse) of 16 neighbours; what is too small for a normal number has no chance at all.
inline f32v chance(const float* logits, float largest, float inverse) {
    f32v x = (load(logits) - largest) * inverse;
    return x < -87.0f ? splat(0) : exp_negative(x);
}

// The logits of block `block`, those behind the row's end being minus infinity.
inline const float* block_of(const float* row, long V, long block, float* end) {
    long first = block * DRAWN_TOGETHER, count = V - first;
    if (count >= DRAWN_TOGETHER) return row + first;
    std::fill(std::copy(row + first, row + V, end), end + DRAWN_TOGETHER, -INFINITY);
    return end;
}

inline float largest_of(const float* row, long V) {
    f32v top = splat(-INFINITY);
    long i = 0;
    for (; i + LANES <= V; i += LANES) top = max(load(row + i), top);
    float largest = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) largest = std::max(largest, top[lane]);
    for (; i < V; i++) largest = std::max(largest, row[i]);
    return largest;
}

// Sums of e^((logits - largest) * inverse) over each block, float; returns their sum.
inline double block_sums(const float* row, long V, float largest, float inverse, float* sums) {
    alignas(64) float end[DRAWN_TOGETHER];
    double total = 0;
    for (long block = 0; block * DRAWN_TOGETHER < V; block++) {
        const float* logits = block_of(row, V, block, end);
        f32v acc = splat(0);
        for (long i = 0; i < DRAWN_TOGETHER; i += LANES) acc += chance(logits + i, largest, inverse);
        sums[block] = sum(acc);
        total += sums[block];
    }
    return total;
}

// The token at which the running sum of the row's probabilities passes `uniform` of its total: first among blocks, then
// inside of the one that was hit. One of no chance is never drawn.
inline long draw_row(const float* row, long V, float inverse, double uniform, float* sums) {
    alignas(64) float end[DRAWN_TOGETHER], chances[DRAWN_TOGETHER];
    float largest = largest_of(row, V);
    double target = uniform * block_sums(row, V, largest, inverse, sums), running = 0;
    long blocks = (V + DRAWN_TOGETHER - 1) / DRAWN_TOGETHER, block = 0, drawn = V - 1;
    for (; block < blocks - 1 && !(running + sums[block] > target); block++) running += sums[block];
    while (block > 0 && !(sums[block] > 0)) running -= sums[--block];  // rounding has left nothing behind the target
    const float* logits = block_of(row, V, block, end);
    for (long i = 0; i < DRAWN_TOGETHER; i += LANES) store(chances + i, chance(logits + i, largest, inverse));
    for (long i = 0; i < DRAWN_TOGETHER; i++) {
        if (!(chances[i] > 0)) continue;
        drawn = block * DRAWN_TOGETHER + i;  // the last one with a chance, where the sum stays below by rounding
        running += chances[i];
        if (running > target) break;
    }
    return drawn;
}

// ids[r]: a token of row r of logits [R, V], drawn by softmax(logits * inverse[r]) and uniforms[r] in [0, 1). `sums` is
// [R, blocks] to work in.
void draw_rows(const float* logits, const float* inverse, const double* uniforms, float* sums, int64_t* ids, long R,
               long V) {
    long blocks = (V + DRAWN_TOGETHER - 1) / DRAWN_TOGETHER;
#pragma omp parallel for schedule(static) if (R > 1)
    for (long r = 0; r < R; r++) ids[r] = draw_row(logits + r * V, V, inverse[r], uniforms[r], sums + r * blocks);
}

// log_sums[r] = log of the sum of e^(logits * inverse[r]) in row r of logits [R, V]; `sums` as for `draw_rows`.
void log_sum_exp(const float* logits, const float* inverse, float* sums, double* log_sums, long R, long V) {
    long blocks = (V + DRAWN_TOGETHER - 1) / DRAWN_TOGETHER;
#pragma omp parallel for schedule(static) if (R > 1)
    for (long r = 0; r < R; r++) {
        float largest = largest_of(logits + r * V, V);
        double total = block_sums(logits + r * V, V, largest, inverse[r], sums + r * blocks);
        log_sums[r] = double(largest) * inverse[r] + std::log(total);
    }
}

}  // namespace
