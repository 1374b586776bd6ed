// FP8 training: activations in tiles, weights in blocks, and products that are promoted every 128 numbers. The definitions
// are fathom/precision/tiles.py and products.py; quantising equals them to the bit.
//
// A factor is stored as e4m3 codes beside its scales. On its way into the multipliers a code becomes the bfloat16 that equals
// it, so a sum of 128 products is one chain of float32 additions (a multiplier that loses nothing but the last bit); then it
// is multiplied by both scales and added to float32 registers. The loops are those of training.h with that second sum around
// them. Widening costs little because it is done once for many products: a matrix when it is packed, rows when a block of
// them comes into the cache.
//
// The gradient of a weight sums over rows, so there its factors need scales that hold for 128 rows of one column: tiles are
// made anew, from codes and scales where rows were kept in FP8. Groups of rows have tiles of their own, the last one shorter.

#pragma once

#include "training.h"

namespace {

constexpr long TILE = 128;

inline long tiles_of(long count) { return (count + TILE - 1) / TILE; }

// Up to LANES numbers; what is missing is zero.
template <typename T>
inline f32v load_some(const T* p, long count) {
    if (count >= LANES) return load(p);
    T filled[LANES] = {};
    std::copy_n(p, count, filled);
    return load(filled);
}

inline f32v magnitude(f32v v) { return (f32v)((i32v)v & 0x7fffffff); }

// The largest magnitude so far as float32's bits, which are ordered as their numbers are, infinity and NaN above all others.
inline i32v largest_bits(i32v so_far, f32v v) {
    i32v bits = (i32v)magnitude(v);
    return bits > so_far ? bits : so_far;
}

inline float scale_of(int32_t largest, float largest_code, bool power_of_two) {
    float most;
    std::memcpy(&most, &largest, 4);
    if (!std::isfinite(most)) return NAN;
    if (most == 0) return 1.0f;
    float scale = std::max(most / largest_code, 0x1p-126f);
    if (!power_of_two) return scale;
    int32_t bits;
    std::memcpy(&bits, &scale, 4);
    bits = (bits + 0x7fffff) & 0x7f800000;
    std::memcpy(&scale, &bits, 4);
    return scale;
}

// Codes of small floats: LEAST is the exponent of the smallest normal one, FRACTION its bits of fraction, SIGN the place of
// its sign. To nearest, ties to even; nothing given may round to more than the largest code.
template <int LEAST, int FRACTION, int SIGN>
inline i32v encode(f32v v) {
    constexpr int DROPPED = 23 - FRACTION;
    i32v size = (i32v)magnitude(v), sign = (i32v)((u32v)v >> 31) << SIGN;
    i32v normal = ((size + ((1 << (DROPPED - 1)) - 1) + (size >> DROPPED & 1)) >> DROPPED) - ((126 + LEAST) << FRACTION);
    // Below it codes are equal steps apart: adding a number whose last place is worth one step rounds to them.
    f32v anchor = splat(std::ldexp(1.0f, LEAST - FRACTION + 23));
    i32v small = (i32v)((f32v)size + anchor) - (i32v)anchor;
    return (size < ((127 + LEAST) << 23) ? small : normal) | sign;
}

typedef uint8_t u8v __attribute__((vector_size(16)));
constexpr int NO_NUMBER = 0x7f;

inline void store_codes(uint8_t* to, i32v codes, long count) {
    u8v bytes = __builtin_convertvector(codes, u8v);
    std::memcpy(to, &bytes, std::min(count, LANES));
}

// x in units of its scale; all of a tile without a scale is no number.
inline i32v e4m3_of(f32v x, f32v scale) {
    i32v codes = encode<-6, 3, 7>(x / scale);
    return scale == scale ? codes : i32v{} + NO_NUMBER;
}

// Codes as the bfloat16 that equal them.
inline void widen_codes(const uint8_t* codes, bf16* to, long count) {
    long i = 0;
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
    __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    for (; i + 64 <= count; i += 64) {
        u32v crosswise[2];
        widen_pair(codes + i, crosswise);
        _mm512_storeu_si512(to + i, _mm512_permutex2var_epi64((__m512i)crosswise[0], first, (__m512i)crosswise[1]));
        _mm512_storeu_si512(to + i + 32, _mm512_permutex2var_epi64((__m512i)crosswise[0], second, (__m512i)crosswise[1]));
    }
#endif
    for (; i < count; i++) to[i] = WIDENED.whole[codes[i]];
}

// ---- Making tiles ----

// visit(k, count, values) for the pieces of a tile, up to LANES numbers each.
template <typename T, typename Visit>
inline void pieces(const T* tile, long width, Visit&& visit) {
    for (long k = 0; k < width; k += LANES) visit(k, std::min(LANES, width - k), load_some(tile + k, width - k));
}

inline int32_t largest_of(i32v bits) {
    int32_t most = 0;
    for (int i = 0; i < LANES; i++) most = std::max(most, bits[i]);
    return most;
}

// x [M, K], rows ldx apart -> codes [M, K], scales [M, tiles of K]; returns how many tiles are no numbers.
template <typename T>
long tile_rows(const T* x, long ldx, long M, long K, bool power_of_two, uint8_t* codes, float* scales) {
    long bad = 0, across = tiles_of(K);
#pragma omp parallel for reduction(+ : bad) if (M * K > 1 << 14)
    for (long m = 0; m < M; m++)
        for (long t = 0; t < across; t++) {
            const T* tile = x + m * ldx + t * TILE;
            uint8_t* to = codes + m * K + t * TILE;
            long width = std::min(TILE, K - t * TILE);
            i32v largest{};
            pieces(tile, width, [&](long, long, f32v v) { largest = largest_bits(largest, v); });
            float scale = scale_of(largest_of(largest), 448.0f, power_of_two);
            scales[m * across + t] = scale;
            bad += std::isnan(scale);
            pieces(tile, width, [&](long k, long n, f32v v) { store_codes(to + k, e4m3_of(v, splat(scale)), n); });
        }
    return bad;
}

// w [E, N, K] -> codes, scales [E, tiles of N, tiles of K]: one for each block of 128 x 128.
template <typename T>
long tile_blocks(const T* w, long E, long N, long K, uint8_t* codes, float* scales) {
    long bad = 0, down = tiles_of(N), across = tiles_of(K);
#pragma omp parallel for reduction(+ : bad)
    for (long block = 0; block < E * down * across; block++) {
        long e = block / (down * across), n0 = block / across % down * TILE, k0 = block % across * TILE;
        long height = std::min(TILE, N - n0), width = std::min(TILE, K - k0), begin = (e * N + n0) * K + k0;
        i32v largest{};
        for (long n = 0; n < height; n++)
            pieces(w + begin + n * K, width, [&](long, long, f32v v) { largest = largest_bits(largest, v); });
        float scale = scale_of(largest_of(largest), 448.0f, false);
        scales[block] = scale;
        bad += std::isnan(scale);
        for (long n = 0; n < height; n++)
            pieces(w + begin + n * K, width, [&](long k, long count, f32v v) {
                store_codes(codes + begin + n * K + k, e4m3_of(v, splat(scale)), count);
            });
    }
    return bad;
}

// Rows of numbers, as an index finds them.
template <typename T>
struct Numbers {
    const T* x;
    long stride;
    const int32_t* at;
    void read(long m, long k, long count, float* to) const {
        const T* row = x + (at ? at[m] : m) * stride + k;
        for (long i = 0; i < count; i += LANES) store(to + i, load_some(row + i, count - i));
    }
};

// The same of rows in tiles.
struct Scaled {
    const uint8_t* codes;
    const float* scales;
    long width;
    const int32_t* at;
    long row(long m) const { return at ? at[m] : m; }
    void read(long m, long k, long count, float* to) const {  // within a tile
        bf16 wide[TILE];
        widen_codes(codes + row(m) * width + k, wide, count);
        float scale = scales[row(m) * tiles_of(width) + k / TILE];
        for (long i = 0; i < count; i += LANES) store(to + i, load_some(wide + i, count - i) * scale);
    }
};

// Rows m of each group, in tiles of 128 rows and one column: codes [M, K], scales [tiles of all groups, K].
template <typename Rows>
long tile_columns(Rows rows, const int32_t* ends, long E, long K, bool power_of_two, uint8_t* codes, float* scales) {
    constexpr long STRIP = 64;
    struct Tall { long begin, end; };
    std::vector<Tall> tiles;
    for (long e = 0; e < E; e++)
        for (long m = e ? ends[e - 1] : 0; m < ends[e]; m += TILE) tiles.push_back({m, std::min(m + TILE, long(ends[e]))});
    long bad = 0, strips = (K + STRIP - 1) / STRIP;
#pragma omp parallel for reduction(+ : bad) schedule(dynamic, 4)
    for (long item = 0; item < long(tiles.size()) * strips; item++) {
        auto [begin, end] = tiles[item / strips];
        long k0 = item % strips * STRIP, width = std::min(STRIP, K - k0);
        alignas(64) float numbers[TILE][STRIP], own[STRIP];
        i32v largest[STRIP / LANES] = {};
        for (long m = begin; m < end; m++) {
            rows.read(m, k0, width, numbers[m - begin]);
            for (long i = 0; i < width; i += LANES)
                largest[i / LANES] = largest_bits(largest[i / LANES], load(numbers[m - begin] + i));
        }
        for (long k = 0; k < STRIP; k++) own[k] = scale_of(largest[k / LANES][k % LANES], 448.0f, power_of_two);
        for (long k = 0; k < width; k++) bad += std::isnan(own[k]);
        std::copy_n(own, width, scales + item / strips * K + k0);
        for (long m = begin; m < end; m++)
            for (long i = 0; i < width; i += LANES)
                store_codes(codes + m * K + k0 + i, e4m3_of(load(numbers[m - begin] + i), load(own + i)), width - i);
    }
    return bad;
}

// What tiles of rows kept, as bfloat16.
inline void untile_rows(Scaled x, long M, bf16* y) {
#pragma omp parallel for if (M * x.width > 1 << 14)
    for (long m = 0; m < M; m++)
        for (long t = 0; t < tiles_of(x.width); t++) {
            long width = std::min(TILE, x.width - t * TILE);
            alignas(64) float numbers[TILE];
            x.read(m, t * TILE, width, numbers);
            for (long k = 0; k < width; k += LANES) put(y + m * x.width + t * TILE + k, load(numbers + k), width - k);
        }
}

// ---- Twelve bits: e5m6 in tiles of rows, scales powers of two. A row is K high bytes, then K / 2 bytes of two low halves. ----

constexpr float E5M6_MAX = 65024.0f;

inline long bytes12(long K) { return K + (K + 1) / 2; }

template <typename T>
long pack12(const T* x, long ldx, long M, long K, uint8_t* packed, float* scales) {
    long bad = 0, across = tiles_of(K);
#pragma omp parallel for reduction(+ : bad) if (M * K > 1 << 14)
    for (long m = 0; m < M; m++) {
        uint8_t *high = packed + m * bytes12(K), *low = high + K;
        for (long t = 0; t < across; t++) {
            const T* tile = x + m * ldx + t * TILE;
            long width = std::min(TILE, K - t * TILE);
            i32v largest{};
            pieces(tile, width, [&](long, long, f32v v) { largest = largest_bits(largest, v); });
            float scale = scale_of(largest_of(largest), E5M6_MAX, true);
            scales[m * across + t] = scale;
            bad += std::isnan(scale);
            pieces(tile, width, [&](long k, long n, f32v v) {
                i32v codes = std::isnan(scale) ? i32v{} : encode<-14, 6, 11>(v / scale);
                store_codes(high + t * TILE + k, codes >> 4, n);
                uint8_t* halves = low + (t * TILE + k) / 2;
                for (long i = 0; i < n; i += 2) halves[i / 2] = uint8_t((codes[i] & 15) | (i + 1 < n ? codes[i + 1] & 15 : 0) << 4);
            });
        }
    }
    return bad;
}

inline void unpack12(const uint8_t* packed, const float* scales, long M, long K, bf16* y) {
#pragma omp parallel for if (M * K > 1 << 14)
    for (long m = 0; m < M; m++) {
        const uint8_t *high = packed + m * bytes12(K), *low = high + K;
        for (long k0 = 0; k0 < K; k0 += LANES) {
            long n = std::min(LANES, K - k0);
            float scale = scales[m * tiles_of(K) + k0 / TILE];
            u32v bits{};
            for (long i = 0; i < n; i++) {
                uint32_t code = uint32_t(high[k0 + i]) << 4 | (low[(k0 + i) / 2] >> 4 * (i % 2) & 15);
                bits[i] = (code & 0x7ff) << 17 | (code >> 11) << 31;
            }
            put(y + m * K + k0, (f32v)bits * 0x1p112f * scale, n);
        }
    }
}

// ---- Products ----

// y[m] = W_e x[m], or W_eᵀ x[m] if `columns`, for the rows m of each group e; w [E, N, K] in blocks, N and K even.
inline void scaled_grouped(Scaled x, const int32_t* ends, long E, const uint8_t* w, const float* w_scales, long N, long K,
                           bool columns, bf16* y) {
    long outputs = columns ? K : N, inputs = columns ? N : K, count = (outputs + PANEL - 1) / PANEL;
    long depth = tiles_of(inputs), across = tiles_of(K);
    std::vector<Piece> items = pieces_of_groups(ends, E);
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < items.size(); i++) {
        auto [e, begin, end] = items[i];
        bf16 *matrix = (bf16*)scratch<3>(N * K / 2), *rows = (bf16*)scratch<4>(ROW_BLOCK * inputs / 2);
        uint32_t* panels = scratch<0>(count * PANEL * inputs / 2);
        widen_codes(w + e * N * K, matrix, N * K);
        if (columns) pack_columns(matrix, panels, N, K);
        else pack_rows(matrix, panels, N, K);
        const float* blocks = w_scales + e * tiles_of(N) * across;
        for (long m0 = begin; m0 < end; m0 += ROW_BLOCK) {
            long height = std::min(ROW_BLOCK, end - m0);
            const float* row_scales[ROW_BLOCK];
            for (long m = 0; m < height; m++) {
                widen_codes(x.codes + x.row(m0 + m) * inputs, rows + m * inputs, inputs);
                row_scales[m] = x.scales + x.row(m0 + m) * depth;
            }
            for (long p = 0; p < count; p++) {
                const bf16* panel = (const bf16*)panels + p * PANEL * inputs;
                long block = p * PANEL / TILE;
                tiles(height, [&](long m, auto tile) {
                    constexpr int C = decltype(tile)::value;
                    f32v out[C][2], sums[C][2];
                    for (int c = 0; c < C; c++) out[c][0] = out[c][1] = splat(0);
                    for (long t = 0; t < depth; t++) {
                        const bf16* row[C];
                        for (int c = 0; c < C; c++) row[c] = rows + (m + c) * inputs + t * TILE;
                        multiply<C>(row, panel + t * TILE * PANEL, std::min(TILE, inputs - t * TILE), sums);
                        float scale = columns ? blocks[t * across + block] : blocks[block * across + t];
                        for (int c = 0; c < C; c++)
                            for (int half = 0; half < 2; half++) out[c][half] += sums[c][half] * (row_scales[m + c][t] * scale);
                    }
                    put_tile<C>(out, p, outputs, [&](int c) { return y + (m0 + m + c) * outputs; });
                });
            }
        }
    }
}

// dw[e, n, k] = sum over the rows m of group e of dy[m, n] * x[m, k], both in tiles of columns as `tile_columns` lays them.
inline void scaled_weight_gradient(Scaled dy, Scaled x, const int32_t* ends, long E, float* dw) {
    constexpr long PAIRS = TILE / 2;
    long N = dy.width, K = x.width;
    long panels = (K + PANEL - 1) / PANEL, strips = (N + LANES - 1) / LANES * (LANES / ROWS);
    long parts = std::min(panels, (2 * omp_get_max_threads() + E - 1) / E);
    std::vector<long> first_tile(E + 1);
    for (long e = 0; e < E; e++) first_tile[e + 1] = first_tile[e] + tiles_of(ends[e] - (e ? ends[e - 1] : 0));
#pragma omp parallel for schedule(dynamic)
    for (long item = 0; item < E * parts; item++) {
        long e = item / parts, first = e ? ends[e - 1] : 0, last = ends[e];
        long from = panels * (item % parts) / parts, to = panels * (item % parts + 1) / parts;
        long left = from * PANEL, right = std::min(K, to * PANEL), part = right - left;
        uint32_t *x_pairs = scratch<0>((to - from) * PAIRS * PANEL), *dy_pairs = scratch<1>(strips * PAIRS * ROWS);
        bf16 *x_rows = (bf16*)scratch<3>(part + LANES), *dy_rows = (bf16*)scratch<4>(N + LANES);
        if (first == last)
            for (long n = 0; n < N; n++) std::fill(dw + (e * N + n) * K + left, dw + (e * N + n) * K + right, 0.0f);
        for (long m0 = first, tile = first_tile[e]; m0 < last; m0 += TILE, tile++) {
            long rows = std::min(TILE, last - m0), count = (rows + 1) / 2;
            for (long j = 0; j < count; j++) {
                bool both = 2 * j + 1 < rows;
                bf16 *even = x_rows, *odd = both ? x_rows + part : nullptr;
                widen_codes(x.codes + (m0 + 2 * j) * K + left, even, part);
                if (both) widen_codes(x.codes + (m0 + 2 * j + 1) * K + left, odd, part);
                for (long k = 0; k < part; k += LANES) {
                    u32v pair = pairs(even + k, odd ? odd + k : odd, std::min(LANES, part - k));
                    std::memcpy(x_pairs + k / PANEL * PAIRS * PANEL + j * PANEL + k % PANEL, &pair, 64);
                }
                even = dy_rows, odd = both ? dy_rows + N : nullptr;
                widen_codes(dy.codes + (m0 + 2 * j) * N, even, N);
                if (both) widen_codes(dy.codes + (m0 + 2 * j + 1) * N, odd, N);
                for (long n = 0; n < N; n += LANES) {
                    u32v pair = pairs(even + n, odd ? odd + n : odd, std::min(LANES, N - n));
                    for (long half = 0; half < LANES / ROWS; half++)
                        std::memcpy(dy_pairs + ((n / ROWS + half) * PAIRS + j) * ROWS, (uint32_t*)&pair + half * ROWS, 4 * ROWS);
                }
            }
            const float *x_scales = x.scales + tile * K, *dy_scales = dy.scales + tile * N;
            for (long p = from; p < to; p++)
                for (long n = 0; n < N; n += ROWS) {
                    const bf16* strip[ROWS];
                    for (int c = 0; c < ROWS; c++) strip[c] = (const bf16*)(dy_pairs + n * PAIRS + c);
                    f32v sums[ROWS][2];
                    multiply<ROWS, 2 * ROWS>(strip, (const bf16*)(x_pairs + (p - from) * PAIRS * PANEL), 2 * count, sums);
                    for (int c = 0; c < ROWS && n + c < N; c++)
                        for (int half = 0; half < 2; half++) {
                            long k = p * PANEL + half * LANES;
                            if (k >= K) continue;
                            float* sum = dw + (e * N + n + c) * K + k;
                            f32v more = sums[c][half] * (dy_scales[n + c] * load_some(x_scales + k, K - k));
                            put(sum, m0 > first ? load_some(sum, K - k) + more : more, K - k);
                        }
                }
        }
    }
}

}  // namespace
