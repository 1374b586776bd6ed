// Remembered latents in FP8, in FlashMLA's layout: fathom/model/latents.py is the definition, writing and reading equal it
// to the bit.
//
// A page is widened once for all query heads of a token that a core computes, into room that stays in its cache, and then
// attended to as a page of bfloat16 is. Half the bytes come from memory, and what is widened is what a stretch of a prompt
// reads back: scales are powers of two, so a code times its scale is a bfloat16 number.

#pragma once

#include "attention.h"
#include "tiles.h"

namespace {

struct LatentRow {
    long latent, rope;
    long width() const { return latent + rope; }
    long key() const { return latent + latent / TILE * long(sizeof(float)); }  // where the shared key begins
    long bytes() const { return key() + rope * long(sizeof(bf16)); }
};

constexpr float LEAST_LARGEST = 448e-4f;  // what makes scales 1e-4 before they are rounded up

inline void pack_latent(const bf16* from, LatentRow row, uint8_t* to) {
    int32_t least;
    std::memcpy(&least, &LEAST_LARGEST, 4);
    for (long t = 0; t < row.latent / TILE; t++) {
        const bf16* tile = from + t * TILE;
        i32v bits{};
        for (long i = 0; i < TILE; i += LANES) bits = largest_bits(bits, load(tile + i));
        float scale = scale_of(std::max(least, largest_of(bits)), 448.0f, true);
        for (long i = 0; i < TILE; i += LANES)
            store_codes(to + t * TILE + i, e4m3_of(load(tile + i), splat(scale)), LANES);
        std::memcpy(to + row.latent + t * long(sizeof scale), &scale, sizeof scale);
    }
    std::memcpy(to + row.key(), from + row.latent, row.rope * sizeof(bf16));
}

// 128 codes times their scale. A power of two is added to the exponents of what is not zero: codes are far from the ends
// of bfloat16's range, and no scale below 1e-4 is ever written.
inline void widen_tile(const uint8_t* codes, float scale, bf16* to) {
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
    int32_t bits;
    std::memcpy(&bits, &scale, 4);
    if ((bits & 0x807fffff) == 0 && scale >= 0x1p-64f) {
        __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
        __m512i exponent = _mm512_set1_epi16(short((bits >> 23) - 127) * 128);
        for (long i = 0; i < TILE; i += 64) {
            u32v pair[2];
            widen_pair(codes + i, pair);
            for (__m512i& half : (__m512i(&)[2])pair)
                half = _mm512_mask_add_epi16(half, _mm512_test_epi16_mask(half, _mm512_set1_epi16(0x7f80)), half, exponent);
            _mm512_storeu_si512(to + i, _mm512_permutex2var_epi64((__m512i)pair[0], first, (__m512i)pair[1]));
            _mm512_storeu_si512(to + i + 32, _mm512_permutex2var_epi64((__m512i)pair[0], second, (__m512i)pair[1]));
        }
        return;
    }
#endif
    widen_codes(codes, to, TILE);
    for (long i = 0; i < TILE; i += LANES) store(to + i, load(to + i) * scale);
}

inline void widen_latent(const uint8_t* from, LatentRow row, bf16* to) {
    for (long t = 0; t < row.latent / TILE; t++) {
        float scale;
        std::memcpy(&scale, from + row.latent + t * long(sizeof scale), sizeof scale);
        widen_tile(from + t * TILE, scale, to + t * TILE);
    }
    const uint8_t* key = from + row.key();
    long i = 0;
    for (; i + LANES <= row.rope; i += LANES) std::memcpy(to + row.latent + i, key + i * 2, 2 * LANES);
    for (; i < row.rope; i++) std::memcpy(to + row.latent + i, key + i * 2, 2);
}

void write_latents(const bf16* rows, long stride, LatentRow row, uint8_t* pages, const int64_t* places, long tokens) {
#pragma omp parallel for if (tokens * row.latent > 1 << 14)
    for (long t = 0; t < tokens; t++) pack_latent(rows + t * stride, row, pages + places[t] * row.bytes());
}

// The first `count` positions of a sequence that owns these pages, [count, latent + rope].
void read_latents(const uint8_t* pages, const int64_t* owned, long count, LatentRow row, bf16* out) {
#pragma omp parallel for if (count * row.latent > 1 << 14)
    for (long t = 0; t < count; t++)
        widen_latent(pages + (owned[t / PAGE] * PAGE + t % PAGE) * row.bytes(), row, out + t * row.width());
}

// Some query heads of one token over its pages; `after` is where another call will begin.
void attend_latents(const bf16* q, long heads, const uint8_t* pages, LatentRow row, const int32_t* table, long visible,
                    float scale, bf16* out, const uint8_t* after) {
    static thread_local std::vector<u32v> widened, summed;  // of registers, which lie as registers want
    static thread_local std::vector<Softmax> softmax;
    widened.resize(PAGE * row.width() / (2 * LANES));
    summed.assign(heads * row.latent / LANES, u32v{});
    softmax.assign(heads, {});
    bf16* page = (bf16*)widened.data();
    float* mixed = (float*)summed.data();
    for (long start = 0; start < visible; start += PAGE) {
        long count = std::min(PAGE, visible - start);
        const uint8_t* stored = pages + table[start / PAGE] * PAGE * row.bytes();
        for (long t = 0; t < count; t++) widen_latent(stored + t * row.bytes(), row, page + t * row.width());
        const uint8_t* next = start + PAGE < visible ? pages + table[start / PAGE + 1] * PAGE * row.bytes() : after;
        for (long first = 0; first < heads; first += HEADS_AT_ONCE) {
            bool last = first + HEADS_AT_ONCE >= heads;
            Soon soon{last ? (const char*)next : nullptr, row.bytes()};
            some_heads(heads - first, [&](auto H) {
                attend_page<decltype(H)::value>(q + first * row.width(), page, page, row.width(), row.width(), count,
                                                row.width(), row.latent, scale, softmax.data() + first,
                                                mixed + first * row.latent, soon);
            });
        }
    }
    for (long h = 0; h < heads; h++) put_mixed(mixed + h * row.latent, row.latent, softmax[h], out + h * row.latent);
}

void latent_attention(const bf16* q, const uint8_t* pages, LatentRow row, bf16* out, const int32_t* tables,
                      const int32_t* visible, long tokens, long heads, long table_width, float scale) {
    long parts = (heads + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE;
#pragma omp parallel
    {
        long first, stop;
        my_items(visible, tokens, parts, first, stop);
        for (long item = first; item < stop;) {
            long n = item / parts, end = std::min(stop, (n + 1) * parts);
            long head = (item - n * parts) * HEADS_AT_ONCE;
            long count = std::min(heads, (end - n * parts) * HEADS_AT_ONCE) - head;
            attend_latents(q + (n * heads + head) * row.width(), count, pages, row, tables + n * table_width, visible[n],
                           scale, out + (n * heads + head) * row.latent,
                           end < stop ? pages + tables[(n + 1) * table_width] * PAGE * row.bytes() : nullptr);
            item = end;
        }
    }
}

}  // namespace
