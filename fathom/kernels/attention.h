// Attention of single tokens over pages.

#pragma once

#include "products.h"

namespace {

constexpr long HEADS_AT_ONCE = 8;

// The sums of 16 vectors, as one vector.
inline f32v sums(const f32v* v) {
#if defined(__AVX512F__)
    __m512 pairs[8], quads[4];
    for (int i = 0; i < 8; i++) {
        __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; i++) {
        __m512d a = (__m512d)pairs[2 * i], b = (__m512d)pairs[2 * i + 1];
        quads[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    // quads[i] holds, in each 128-bit part, a quarter of the sums 4i..4i+3.
    auto halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    };
    return (f32v)halves(halves(quads[0], quads[1]), halves(quads[2], quads[3]));
#else
    f32v out;
    for (int i = 0; i < LANES; i++) out[i] = sum(v[i]);
    return out;
#endif
}

// mixed[h] += sum over tokens of scores[h][t] * values[t], for V registers of a head's width. On the way, with every
// token, `lines` cache lines of memory from `soon` on are asked for, rows of `soon_row` bytes.
template <int H, int V, typename T>
inline void mix(const T* values, long value_token, const float scores[][PAGE], long count, float* mixed, long width,
                const char* soon, long soon_row, long lines) {
    f32v acc[H][V];
    for (int h = 0; h < H; h++)
        for (int v = 0; v < V; v++) acc[h][v] = load(mixed + h * width + v * LANES);
    for (long t = 0; t < count; t++) {
        for (long i = 0; i < lines; i++) __builtin_prefetch(soon + t * soon_row + 64 * i);
        f32v value[V];
        for (int v = 0; v < V; v++) value[v] = load(values + t * value_token + v * LANES);
#pragma GCC unroll 8
        for (int h = 0; h < H; h++)
            for (int v = 0; v < V; v++) acc[h][v] += value[v] * scores[h][t];
    }
    for (int h = 0; h < H; h++)
        for (int v = 0; v < V; v++) store(mixed + h * width + v * LANES, acc[h][v]);
}

// H query heads of one token that read the same key head, over pages. Softmax runs along (arXiv 1805.02867): sums are
// kept relative to the largest score so far, and scaled down when a larger one comes.
//
// A page lies anywhere, so the processor cannot guess which memory comes next: while scores are computed the page's
// values are asked for, and while values are mixed the next page's keys (`after` is where another call will begin), a few
// lines at a time, since a core can wait for a few only.
template <int H, typename T>
void attend(const T* q, const T* keys, const T* values, long key_page, long value_page, long key_token, long value_token,
            const int32_t* pages, long visible, long key_width, long value_width, float scale, T* out, float* mixed,
            const T* after) {
    float largest[H], total[H];
    alignas(64) float scores[H][PAGE];
    for (int h = 0; h < H; h++) largest[h] = -INFINITY, total[h] = 0;
    std::fill(mixed, mixed + H * value_width, 0.0f);
    for (long start = 0; start < visible; start += PAGE) {
        long count = std::min(PAGE, visible - start);
        const T* page_keys = keys + pages[start / PAGE] * key_page;
        const T* page_values = values + pages[start / PAGE] * value_page;
        const T* next_keys = start + PAGE < visible ? keys + pages[start / PAGE + 1] * key_page : after;
        for (long t = 0; t < count; t += LANES)
            for (int h = 0; h < H; h++) {  // a page is always whole: what is beyond `count` is computed and masked
                f32v acc[LANES];
                for (int i = 0; i < LANES; i++) acc[i] = splat(0);
                if (h == 0 && page_values != page_keys)
                    for (long i = 0; i < LANES * value_width * long(sizeof(T)); i += 64)
                        __builtin_prefetch((const char*)(page_values + t * value_token) + i);
                for (long k = 0; k < key_width; k += 32)
#pragma GCC unroll 16
                    for (int i = 0; i < LANES; i++)
                        acc[i] = dot32(acc[i], q + h * key_width + k, page_keys + (t + i) * key_token + k);
                f32v score = sums(acc) * scale;
                for (long i = std::max(0L, count - t); i < LANES; i++) score[i] = -INFINITY;
                store(scores[h] + t, score);
            }
        for (int h = 0; h < H; h++) {
            f32v top = splat(largest[h]);
            for (long t = 0; t < count; t += LANES) top = max(top, load(scores[h] + t));
            float new_largest = largest[h];
            for (int i = 0; i < LANES; i++) new_largest = std::max(new_largest, top[i]);
            if (new_largest > largest[h]) {
                float shrink = std::exp(largest[h] - new_largest);
                total[h] *= shrink;
                for (long d = 0; d < value_width; d += LANES)
                    store(mixed + h * value_width + d, load(mixed + h * value_width + d) * shrink);
                largest[h] = new_largest;
            }
            f32v added = splat(0);
            for (long t = 0; t < count; t += LANES) {
                f32v score = load(scores[h] + t);
                f32v p = score == splat(-INFINITY) ? splat(0) : exp_negative(score - largest[h]);
                store(scores[h] + t, p);
                added += p;
            }
            total[h] += sum(added);
        }
        long d = 0, key_row = key_token * sizeof(T), lines = next_keys ? key_row / 64 : 0, asked = 0;
        for (; d < value_width; d += 2 * LANES) {
            const char* soon = (const char*)next_keys + 64 * asked;
            long now = d + 2 * LANES < value_width ? std::min(1L, lines - asked) : lines - asked;
            asked += now;
            if (d + 2 * LANES <= value_width)
                mix<H, 2>(page_values + d, value_token, scores, count, mixed + d, value_width, soon, key_row, now);
            else
                mix<H, 1>(page_values + d, value_token, scores, count, mixed + d, value_width, soon, key_row, now);
        }
    }
    for (int h = 0; h < H; h++)
        for (long d = 0; d < value_width; d += LANES)
            store(out + h * value_width + d, load(mixed + h * value_width + d) * (1.0f / total[h]));
}

template <typename T>
void paged_attention(const T* q, const T* keys, const T* values, T* out, const int32_t* tables, const int32_t* visible,
                     long tokens, long heads, long groups, long key_width, long value_width, long key_page,
                     long value_page, long key_token, long value_token, long table_width, float scale) {
    long share = heads / groups, parts = (share + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE, items = tokens * groups * parts;
    long total = 0;
    for (long n = 0; n < tokens; n++) total += visible[n] * groups * parts;
    auto keys_of = [&](long item) {
        long n = item / parts / groups, g = item / parts % groups;
        return keys + g * PAGE * key_token + tables[n * table_width] * key_page;
    };
#pragma omp parallel
    {
        std::vector<float> mixed(HEADS_AT_ONCE * value_width);
        // Each core takes neighbours, as many as make its share of the keys: then it knows what comes next.
        long threads = omp_get_num_threads(), thread = omp_get_thread_num(), before = 0;
        for (long item = 0; item < items; item++) {
            long n = item / parts / groups, g = item / parts % groups, part = item % parts;
            long owner = std::min(threads - 1, (before + visible[n] / 2) * threads / total);
            before += visible[n];
            if (owner != thread) continue;
            long first = g * share + part * HEADS_AT_ONCE;
            int count = int(std::min(HEADS_AT_ONCE, share - part * HEADS_AT_ONCE));
            auto run = [&](auto H) {
                attend<decltype(H)::value>(q + (n * heads + first) * key_width, keys + g * PAGE * key_token,
                                           values + g * PAGE * value_token, key_page, value_page, key_token, value_token,
                                           tables + n * table_width, visible[n], key_width, value_width, scale,
                                           out + (n * heads + first) * value_width, mixed.data(),
                                           item + 1 < items ? keys_of(item + 1) : nullptr);
            };
            if (count == HEADS_AT_ONCE) run(std::integral_constant<int, HEADS_AT_ONCE>{});
            else last_tile<HEADS_AT_ONCE - 1>(count, run);
        }
    }
}

}  // namespace
