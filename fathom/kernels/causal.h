// Causal attention over whole sequences, forward and backward, in bfloat16 with float32 statistics.
//
// Scores never reach memory: ROWS queries at a time meet the panels of keys they may see, and what comes out of the softmax
// goes straight into the product with the values. Forward keeps log(sum exp(scores)) of every query, from which backward
// makes the probabilities again (arXiv 2307.08691). Every product is the panel loop of products.h: keys and values are
// packed once per head and span of queries; the sums over queries, dK and dV, lay rows in pairs as training.h does.
//
// A query's result does not depend on where its row stands in a tile, nor on how many queries there are.

#pragma once

#include <limits>

#include "training.h"

namespace {

constexpr long SPAN = 512;     // queries that share one packing of the keys before them
constexpr long QUERIES = 128; // queries whose gradients of keys and values are summed at a time

// [B, heads, T, width] with any strides over the first three.
struct Heads {
    bf16* x;
    long batch, head, token;
    bf16* row(long b, long h, long t) const { return x + b * batch + h * head + t * token; }
    Source rows(long b, long h) const { return {row(b, h, 0), token}; }
};

struct CausalShape {
    long B, H, G, T, S, D, V;  // sequences, query heads, key heads, queries, keys, widths of queries and values
};

inline long round_up(long x, long step) { return (x + step - 1) / step * step; }

// `count` rows of `width` numbers -> [width / PANEL][round_up(count, 2) / 2][PANEL]: rows in pairs, columns in panels.
inline void pair_rows(Source x, long count, long width, uint32_t* to) {
    long half = (count + 1) / 2;
    for (long p = 0; p * PANEL < width; p++)
        for (long j = 0; j < half; j++)
            for (long i = p * PANEL; i < (p + 1) * PANEL; i += LANES) {
                const bf16 *even = x[2 * j], *odd = 2 * j + 1 < count ? x[2 * j + 1] + i : nullptr;
                u32v both = i < width ? pairs(even + i, odd, std::min(LANES, width - i)) : u32v{};
                std::memcpy(to + (p * half + j) * PANEL + i % PANEL, &both, 64);
            }
}

// `count` rows of `width` numbers (even) -> [count / PANEL][width / 2][PANEL]: rows in panels, columns in pairs.
inline void panel_rows(Source x, long count, long width, uint32_t* to) {
    for (long p = 0; p * PANEL < count; p++)
        for (long k = 0; k < width; k += LANES) {
            long wide = std::min(LANES, width - k);
            uint32_t block[PANEL][LANES / 2] = {};
            for (long i = 0; i < PANEL && p * PANEL + i < count; i++) std::memcpy(block[i], x[p * PANEL + i] + k, 2 * wide);
            for (long j = 0; j < wide / 2; j++)
                for (long i = 0; i < PANEL; i++) to[(p * width / 2 + k / 2 + j) * PANEL + i] = block[i][j];
        }
}

// Which of the keys k … k + LANES - 1 lie before `visible`: v there, else `otherwise`.
inline f32v only_visible(f32v v, long k, long visible, float otherwise) {
    if (k + LANES <= visible) return v;
    for (long i = std::max(0L, visible - k); i < LANES; i++) v[i] = otherwise;
    return v;
}

void causal_forward(Heads q, Heads k, Heads v, Heads o, float* log_sums, CausalShape s, float scale) {
    long spans = (s.T + SPAN - 1) / SPAN, group = s.H / s.G, past = s.S - s.T;
    float least = -std::numeric_limits<float>::infinity();
#pragma omp parallel for schedule(dynamic)
    for (long item = 0; item < s.B * s.G * spans; item++) {
        long b = item / spans / s.G, g = item / spans % s.G, start = (spans - 1 - item % spans) * SPAN;
        long stop = std::min(s.T, start + SPAN), keys = past + stop, filled = round_up(keys, PANEL);
        uint32_t *key_panels = scratch<3>(filled * s.D / 2), *value_panels = scratch<4>(filled * round_up(s.V, PANEL) / 2);
        float* scores = (float*)scratch<5>(ROWS * filled);
        bf16* weights = (bf16*)scratch<6>(ROWS * filled / 2);
        panel_rows(k.rows(b, g), keys, s.D, key_panels);
        pair_rows(v.rows(b, g), keys, s.V, value_panels);
        for (long h = g * group; h < (g + 1) * group; h++)
            tiles(stop - start, [&](long row, auto tile) {
                constexpr int C = decltype(tile)::value;
                long t = start + row, seen = past + t + C;
                const bf16 *queries[C], *rows[C];
                for (int c = 0; c < C; c++) queries[c] = q.row(b, h, t + c), rows[c] = weights + c * filled;
                f32v out[C][2], top[C], total[C];
                for (int c = 0; c < C; c++) top[c] = splat(least), total[c] = splat(0);
                for (long p = 0; p * PANEL < seen; p++) {
                    multiply<C>(queries, (const bf16*)key_panels + p * PANEL * s.D, s.D, out);
                    for (int c = 0; c < C; c++)
                        for (int half = 0; half < 2; half++) {
                            long key = p * PANEL + half * LANES;
                            f32v score = only_visible(out[c][half] * scale, key, past + t + c + 1, least);
                            top[c] = max(top[c], score);
                            store(scores + c * filled + key, score);
                        }
                }
                for (int c = 0; c < C; c++) {
                    float most = least;
                    for (int i = 0; i < LANES; i++) most = std::max(most, top[c][i]);
                    for (long key = 0; key < round_up(seen, PANEL); key += LANES) {
                        f32v e = only_visible(exp_negative(load(scores + c * filled + key) - most), key, past + t + c + 1, 0);
                        total[c] += e;
                        store(weights + c * filled + key, e);
                    }
                    float whole = sum(total[c]);
                    total[c] = splat(1.0f / whole);
                    log_sums[(b * s.H + h) * s.T + t + c] = most + std::log(whole);
                }
                for (long p = 0; p * PANEL < s.V; p++) {
                    multiply<C>(rows, (const bf16*)value_panels + p * PANEL * round_up(keys, 2), round_up(seen, 2), out);
                    for (int c = 0; c < C; c++) out[c][0] *= total[c], out[c][1] *= total[c];
                    put_tile<C>(out, p, s.V, [&](int c) { return o.row(b, h, t + c); });
                }
            });
    }
}

// sums[n, i] += the products of `count` pairs of rows: strips [.., ROWS] at n with panels [width / PANEL][stride][PANEL].
inline void add_products(const uint32_t* strip, const uint32_t* panels, long stride, long count, float* sums, long width) {
    const bf16* rows[ROWS];
    for (int c = 0; c < ROWS; c++) rows[c] = (const bf16*)(strip + c);
    for (long p = 0; p * PANEL < width; p++) {
        f32v out[ROWS][2];
        multiply<ROWS, 2 * ROWS>(rows, (const bf16*)(panels + p * stride * PANEL), 2 * count, out);
        for (int c = 0; c < ROWS; c++)
            for (int half = 0; half < 2; half++) {
                float* to = sums + c * width + p * PANEL + half * LANES;
                store(to, load(to) + out[c][half]);
            }
    }
}

// QUERIES rows, `step` apart -> strips [keys / ROWS][QUERIES / 2][ROWS] of their first `keys` columns.
inline void into_strips(const bf16* rows, long step, long keys, uint32_t* strips) {
    for (long k = 0; k < keys; k += LANES)
        for (long j = 0; j < QUERIES / 2; j++) {
            u32v both = pairs(rows + 2 * j * step + k, rows + (2 * j + 1) * step + k, LANES);
            for (long half = 0; half < LANES / ROWS; half++)
                std::memcpy(strips + ((k / ROWS + half) * QUERIES / 2 + j) * ROWS, (uint32_t*)&both + half * ROWS, 4 * ROWS);
        }
}

// A score's gradient is weight * (d_weight - delta), delta being the mean of d_weight by weight. The usual short cut,
// delta = o . d_o, takes an output that was rounded: then the gradients no longer sum to zero, and what is left over is
// multiplied by whatever the keys have in common. So delta is summed here, in float32.
void causal_backward(Heads d_o, Heads q, Heads k, Heads v, const float* log_sums, Heads dq, Heads dk, Heads dv,
                     CausalShape s, float scale) {
    long group = s.H / s.G, past = s.S - s.T, filled = round_up(s.S, PANEL);
    long key_width = round_up(s.D, PANEL), value_width = round_up(s.V, PANEL);
#pragma omp parallel for schedule(dynamic)
    for (long item = 0; item < s.B * s.G; item++) {
        long b = item / s.G, g = item % s.G;
        uint32_t *key_panels = scratch<3>(filled * s.D / 2), *value_panels = scratch<4>(filled * s.V / 2);
        uint32_t *key_pairs = scratch<5>(filled * key_width / 2), *query_pairs = scratch<6>(QUERIES * key_width / 2);
        uint32_t *d_pairs = scratch<7>(QUERIES * value_width / 2), *strips = scratch<8>(QUERIES * filled / 2);
        bf16 *weights = (bf16*)scratch<9>(QUERIES * filled / 2), *d_scores = (bf16*)scratch<10>(QUERIES * filled / 2);
        float *exact_weights = (float*)scratch<13>(ROWS * filled), *d_weights = (float*)scratch<14>(ROWS * filled);
        float *key_sums = (float*)scratch<11>(filled * key_width), *value_sums = (float*)scratch<12>(filled * value_width);
        panel_rows(k.rows(b, g), s.S, s.D, key_panels);
        panel_rows(v.rows(b, g), s.S, s.V, value_panels);
        pair_rows(k.rows(b, g), s.S, s.D, key_pairs);
        std::fill_n(key_sums, filled * key_width, 0.0f);
        std::fill_n(value_sums, filled * value_width, 0.0f);
        for (long h = g * group; h < (g + 1) * group; h++)
            for (long start = 0; start < s.T; start += QUERIES) {
                long count = std::min(QUERIES, s.T - start), most = round_up(past + start + count, PANEL);
                for (long row = 0; row < QUERIES; row++) {
                    long seen = row < count ? round_up(past + start + row + 1, PANEL) : 0;
                    std::fill(weights + row * filled + seen, weights + row * filled + most, bf16(0));
                    std::fill(d_scores + row * filled + seen, d_scores + row * filled + most, bf16(0));
                }
                tiles(count, [&](long row, auto tile) {
                    constexpr int C = decltype(tile)::value;
                    long t = start + row, seen = past + t + C;
                    const bf16 *queries[C], *d_outs[C], *rows[C];
                    float log_sum[C];
                    for (int c = 0; c < C; c++) {
                        queries[c] = q.row(b, h, t + c), d_outs[c] = d_o.row(b, h, t + c);
                        rows[c] = d_scores + (row + c) * filled;
                        log_sum[c] = log_sums[(b * s.H + h) * s.T + t + c];
                    }
                    f32v score[C][2], d_weight[C][2], deltas[C];
                    for (int c = 0; c < C; c++) deltas[c] = splat(0);
                    for (long p = 0; p * PANEL < seen; p++) {
                        multiply<C>(queries, (const bf16*)key_panels + p * PANEL * s.D, s.D, score);
                        multiply<C>(d_outs, (const bf16*)value_panels + p * PANEL * s.V, s.V, d_weight);
                        for (int c = 0; c < C; c++)
                            for (int half = 0; half < 2; half++) {
                                long key = p * PANEL + half * LANES;
                                f32v away = score[c][half] * scale - log_sum[c];
                                f32v weight = only_visible(exp_negative(away > 0.0f ? splat(0) : away), key, past + t + c + 1, 0);
                                deltas[c] += weight * d_weight[c][half];
                                store(weights + (row + c) * filled + key, weight);
                                store(exact_weights + c * filled + key, weight);
                                store(d_weights + c * filled + key, d_weight[c][half]);
                            }
                    }
                    for (int c = 0; c < C; c++) {
                        float delta = sum(deltas[c]);
                        for (long key = 0; key < round_up(seen, PANEL); key += LANES)
                            store(d_scores + (row + c) * filled + key,
                                  load(exact_weights + c * filled + key) * (load(d_weights + c * filled + key) - delta));
                    }
                    for (long p = 0; p * PANEL < s.D; p++) {
                        multiply<C>(rows, (const bf16*)key_pairs + p * PANEL * round_up(s.S, 2), round_up(seen, 2), score);
                        for (int c = 0; c < C; c++) score[c][0] *= scale, score[c][1] *= scale;
                        put_tile<C>(score, p, s.D, [&](int c) { return dq.row(b, h, t + c); });
                    }
                });
                long half = (count + 1) / 2;
                pair_rows({q.row(b, h, start), q.token}, count, s.D, query_pairs);
                pair_rows({d_o.row(b, h, start), d_o.token}, count, s.V, d_pairs);
                // The first query that sees key n is n - past: pairs before it have nothing to add.
                auto add = [&](const bf16* rows, const uint32_t* panels, float* sums, long width) {
                    into_strips(rows, filled, most, strips);
                    for (long n = 0; n < most; n += ROWS) {
                        long j = std::min(half, std::max(0L, n - past - start) / 2);
                        add_products(strips + (n * QUERIES / 2) + j * ROWS, panels + j * PANEL, half, half - j, sums + n * width, width);
                    }
                };
                add(weights, d_pairs, value_sums, value_width);
                add(d_scores, query_pairs, key_sums, key_width);
            }
        for (long t = 0; t < s.S; t++) {
            for (long i = 0; i < s.D; i += LANES) put(dk.row(b, g, t) + i, load(key_sums + t * key_width + i) * scale, s.D - i);
            for (long i = 0; i < s.V; i += LANES) put(dv.row(b, g, t) + i, load(value_sums + t * value_width + i), s.V - i);
        }
    }
}

}  // namespace
