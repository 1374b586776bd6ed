// Weights of one byte each, in blocks that share a scale: the layouts and the reasons are in kernels.cpp.

#pragma once

#include "weights.h"

namespace {

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

    static Int8Weights of(const void* w, const void* scales, long K) {
        return {(const uint8_t*)w, (const bf16*)scales, K};
    }
    template <int SLOT = 0>
    const Int8Weights& ready(long, long) const { return *this; }
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

// The bfloat16 that equals a code of float8 e4m3. Every code has one: numbers below 2^-6, which float8 writes without a
// leading one, have theirs in bfloat16.
constexpr bf16 widened(int code) {
    int sign = (code & 0x80) << 8, exponent = code >> 3 & 15, fraction = code & 7;
    if ((code & 0x7f) == 0x7f) return bf16(sign | 0x7fc0);  // not a number
    if (exponent) return bf16(sign | (exponent + 120) << 7 | fraction << 4);
    if (fraction == 0) return bf16(sign);
    int missing = fraction >= 4 ? 0 : fraction >= 2 ? 1 : 2;  // places to the leading one
    return bf16(sign | (120 - missing) << 7 | (fraction << missing & 3) << 5);
}

struct Widened {
    bf16 whole[256] = {};
    alignas(64) uint8_t low[128] = {}, high[128] = {};  // bytes of the numbers without their signs

    constexpr Widened() {
        for (int code = 0; code < 256; code++) whole[code] = widened(code);
        for (int code = 0; code < 128; code++) low[code] = uint8_t(whole[code]), high[code] = uint8_t(whole[code] >> 8);
    }
};
constexpr Widened WIDENED;

// The codes of a pair of inputs as bfloat16: out[0] has outputs [0, 16), out[1] outputs [16, 32). Codes lie as unpacking
// bytes wants them: eight of the first half, eight of the second, four times.
inline void widen_pair(const uint8_t* codes, u32v out[2]) {
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
    __m512i code = _mm512_loadu_si512(codes), sign = _mm512_and_si512(code, _mm512_set1_epi8(char(0x80)));
    auto find = [&](const uint8_t* table) {
        return _mm512_permutex2var_epi8(_mm512_load_si512(table), code, _mm512_load_si512(table + 64));
    };
    __m512i low = find(WIDENED.low), high = _mm512_or_si512(find(WIDENED.high), sign);
    out[0] = (u32v)_mm512_unpacklo_epi8(low, high);
    out[1] = (u32v)_mm512_unpackhi_epi8(low, high);
#else
    bf16 wide[2][PANEL];
    for (int i = 0; i < 2 * PANEL; i++) wide[i / 8 % 2][i / 16 * 8 + i % 8] = WIDENED.whole[codes[i]];
    std::memcpy(out, wide, sizeof wide);
#endif
}

struct Fp8Weights {
    using Rows = PlainRows<bf16>;
    const uint8_t* w;
    const float* scales;
    long K;
    const u32v* wide = nullptr;  // the panel that is being read, as bfloat16

    static Fp8Weights of(const void* w, const void* scales, long K) {
        return {(const uint8_t*)w, (const float*)scales, K};
    }

    long blocks() const { return (K + FP8_BLOCK - 1) / FP8_BLOCK; }

    Fp8Weights at(long outputs) const {
        long panels = (outputs + PANEL - 1) / PANEL;
        return {w + panels * PANEL * K, scales + panels * blocks(), K};
    }

    // More than one tile of rows reads a panel that is widened once, in room that lasts until the next one.
    template <int SLOT = 0>
    Fp8Weights ready(long p, long M) const {
        if (M <= ROWS) return *this;
        static thread_local std::vector<u32v> room;
        if (long(room.size()) < K) room.resize(K);
        const uint8_t* codes = w + p * PANEL * K;
        for (long k = 0; k < K; k += 2) widen_pair(codes + k * PANEL, room.data() + k);
        return {w, scales, K, room.data()};
    }

    template <int C>
    void panel(const Rows& x, long m, long p, f32v out[C][2]) const {
        const uint8_t* codes = w + p * PANEL * K;
        if (wide)
            sums<C>(x, m, p, out, [&](long k, u32v pair[2]) { pair[0] = wide[k], pair[1] = wide[k + 1]; });
        else
            sums<C>(x, m, p, out, [&](long k, u32v pair[2]) { widen_pair(codes + k * PANEL, pair); });
    }

    // `read` gives the weights of the inputs k and k + 1.
    template <int C, typename Read>
    void sums(const Rows& x, long m, long p, f32v out[C][2], Read&& read) const {
        for (int c = 0; c < C; c++) out[c][0] = out[c][1] = splat(0);
        const float* scale = scales + p * blocks();
        for (long begin = 0; begin < K; begin += FP8_BLOCK, scale++) {
            f32v acc[C][2];
            for (int c = 0; c < C; c++) acc[c][0] = acc[c][1] = splat(0);
            long end = std::min(begin + FP8_BLOCK, K);
            for (long k = begin; k < end; k += 2) {
                u32v weights[2];
                read(k, weights);
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) {
                    int32_t pair;
                    std::memcpy(&pair, x.rows[m + c] + k, 4);
                    acc[c][0] = dot_pair(acc[c][0], weights[0], pair);
                    acc[c][1] = dot_pair(acc[c][1], weights[1], pair);
                }
            }
            for (int c = 0; c < C; c++) out[c][0] += acc[c][0] * *scale, out[c][1] += acc[c][1] * *scale;
        }
    }
};

}  // namespace
