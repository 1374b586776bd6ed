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

// Where a head's softmax stands. It runs along (arXiv 1805.02867): sums are kept relative to the largest score so far, and
// scaled down when a larger one comes.
struct Softmax {
    float largest = -INFINITY, total = 0;
};

// Memory that will be read next, asked for while something else is computed: rows of `row` bytes. Null: nothing.
struct Soon {
    const char* first;
    long row;
};

// H query heads of one token that read the same key head, over the first `count` positions of a page.
//
// A page lies anywhere, so the processor cannot guess which memory comes next: while scores are computed the page's
// values are asked for, and while values are mixed what comes after it, a few lines at a time, since a core can wait for
// a few only.
template <int H, typename T>
inline void attend_page(const T* q, const T* keys, const T* values, long key_token, long value_token, long count,
                        long key_width, long value_width, float scale, Softmax* softmax, float* mixed, Soon soon) {
    alignas(64) float scores[H][PAGE];
    for (long t = 0; t < count; t += LANES)
        for (int h = 0; h < H; h++) {  // a page is always whole: what is beyond `count` is computed and masked
            f32v acc[LANES];
            for (int i = 0; i < LANES; i++) acc[i] = splat(0);
            if (h == 0 && values != keys)
                for (long i = 0; i < LANES * value_width * long(sizeof(T)); i += 64)
                    __builtin_prefetch((const char*)(values + t * value_token) + i);
            for (long k = 0; k < key_width; k += 32)
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    acc[i] = dot32(acc[i], q + h * key_width + k, keys + (t + i) * key_token + k);
            f32v score = sums(acc) * scale;
            for (long i = std::max(0L, count - t); i < LANES; i++) score[i] = -INFINITY;
            store(scores[h] + t, score);
        }
    for (int h = 0; h < H; h++) {
        float& largest = softmax[h].largest;
        float new_largest = largest;
        f32v top = splat(largest);
        for (long t = 0; t < count; t += LANES) top = max(top, load(scores[h] + t));
        for (int i = 0; i < LANES; i++) new_largest = std::max(new_largest, top[i]);
        if (new_largest > largest) {
            float shrink = std::exp(largest - new_largest);
            softmax[h].total *= shrink;
            for (long d = 0; d < value_width; d += LANES)
                store(mixed + h * value_width + d, load(mixed + h * value_width + d) * shrink);
            largest = new_largest;
        }
        f32v added = splat(0);
        for (long t = 0; t < count; t += LANES) {
            f32v score = load(scores[h] + t);
            f32v p = score == splat(-INFINITY) ? splat(0) : exp_negative(score - largest);
            store(scores[h] + t, p);
            added += p;
        }
        softmax[h].total += sum(added);
    }
    long d = 0, lines = soon.first ? soon.row / 64 : 0, asked = 0;
    for (; d < value_width; d += 2 * LANES) {
        const char* first = soon.first + 64 * asked;
        long now = d + 2 * LANES < value_width ? std::min(1L, lines - asked) : lines - asked;
        asked += now;
        if (d + 2 * LANES <= value_width)
            mix<H, 2>(values + d, value_token, scores, count, mixed + d, value_width, first, soon.row, now);
        else
            mix<H, 1>(values + d, value_token, scores, count, mixed + d, value_width, first, soon.row, now);
    }
}

// What a head makes of all that it has seen.
template <typename T>
inline void put_mixed(const float* mixed, long value_width, Softmax softmax, T* out) {
    for (long d = 0; d < value_width; d += LANES) store(out + d, load(mixed + d) * (1.0f / softmax.total));
}

// visit(H) for the next heads that are computed at once, of so many that are left; H a constant of the compiler's.
template <typename Visit>
inline void some_heads(long left, Visit&& visit) {
    if (left >= HEADS_AT_ONCE) visit(std::integral_constant<int, HEADS_AT_ONCE>{});
    else last_tile<HEADS_AT_ONCE - 1>(left, visit);
}

// The calling core's share of `tokens` times `each` items, neighbours, as many as make its share of all visible
// positions: then it knows what comes next.
inline void my_items(const int32_t* visible, long tokens, long each, long& first, long& stop) {
    long threads = omp_get_num_threads(), thread = omp_get_thread_num(), items = tokens * each, total = 0, before = 0;
    for (long n = 0; n < tokens; n++) total += visible[n] * each;
    first = stop = items;
    for (long item = 0; item < items; item++) {
        long own = visible[item / each], owner = std::min(threads - 1, (before + own / 2) * threads / total);
        before += own;
        if (owner >= thread) first = std::min(first, item);
        if (owner > thread) {
            stop = item;
            break;
        }
    }
}

template <typename T>
void paged_attention(const T* q, const T* keys, const T* values, T* out, const int32_t* tables, const int32_t* visible,
                     long tokens, long heads, long groups, long key_width, long value_width, long key_page,
                     long value_page, long key_token, long value_token, long table_width, float scale) {
    long share = heads / groups, parts = (share + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE;
    auto page_of = [&](long item, long page) {
        long n = item / parts / groups, g = item / parts % groups;
        return keys + g * PAGE * key_token + tables[n * table_width + page] * key_page;
    };
#pragma omp parallel
    {
        std::vector<float> mixed(HEADS_AT_ONCE * value_width);
        long begin, stop;
        my_items(visible, tokens, groups * parts, begin, stop);
        for (long item = begin; item < stop; item++) {
            long n = item / parts / groups, g = item / parts % groups, part = item % parts;
            long first = n * heads + g * share + part * HEADS_AT_ONCE;
            std::fill(mixed.begin(), mixed.end(), 0.0f);
            Softmax softmax[HEADS_AT_ONCE] = {};
            some_heads(share - part * HEADS_AT_ONCE, [&](auto H) {
                for (long start = 0; start < visible[n]; start += PAGE) {
                    long page = start / PAGE;
                    const T* next = start + PAGE < visible[n] ? page_of(item, page + 1)
                                    : item + 1 < stop         ? page_of(item + 1, 0)
                                                              : nullptr;
                    attend_page<decltype(H)::value>(
                        q + first * key_width, page_of(item, page),
                        values + g * PAGE * value_token + tables[n * table_width + page] * value_page, key_token,
                        value_token, std::min(PAGE, visible[n] - start), key_width, value_width, scale, softmax,
                        mixed.data(), Soon{(const char*)next, key_token * long(sizeof(T))});
                }
                for (int h = 0; h < decltype(H)::value; h++)
                    put_mixed(mixed.data() + h * value_width, value_width, softmax[h], out + (first + h) * value_width);
            });
        }
    }
}

}  // namespace
