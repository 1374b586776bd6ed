// Registers of 16 numbers: loading, storing, rounding, exponentials, and how cores share work.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;
typedef float f32v __attribute__((vector_size(64)));
typedef int32_t i32v __attribute__((vector_size(64)));
typedef uint32_t u32v __attribute__((vector_size(64)));
typedef uint16_t u16v __attribute__((vector_size(32)));

constexpr long LANES = 16;
constexpr long PANEL = 32;  // outputs that are computed together
constexpr int ROWS = 8;     // rows of activations that share a panel on its way through the registers
constexpr long BLOCK = 64;  // int8 weights per scale
constexpr long FP8_BLOCK = 128;  // inputs that share a float8 weight's scale
constexpr long PAGE = 64;   // tokens per page of the cache

inline f32v splat(float x) { return f32v{} + x; }

inline float sum(f32v v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
#endif
}

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline bf16 narrow(float x) {  // to nearest even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return bf16(bits >> 16 | 0x40);
    return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline f32v load(const float* p) {
    f32v v;
    std::memcpy(&v, p, 64);
    return v;
}

inline f32v load(const bf16* p) {
    u16v half;
    std::memcpy(&half, p, 32);
    return (f32v)(__builtin_convertvector(half, u32v) << 16);
}

inline void store(float* p, f32v v) { std::memcpy(p, &v, 64); }

inline void store(bf16* p, f32v v) {
#if defined(__AVX512BF16__)
    __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &half, 32);
#else
    u32v bits = (u32v)v;
    u32v rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    rounded = (v == v) ? rounded : (bits >> 16 | 0x40);
    u16v half = __builtin_convertvector(rounded, u16v);
    std::memcpy(p, &half, 32);
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return widen(x); }
inline void assign(float& to, float x) { to = x; }
inline void assign(bf16& to, float x) { to = narrow(x); }

// Sum of products of 32 neighbours, lane by lane.
inline f32v dot32(f32v acc, const bf16* a, const bf16* b) {
#if defined(__AVX512BF16__)
    return (f32v)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
#else
    return acc + load(a) * load(b) + load(a + LANES) * load(b + LANES);
#endif
}

inline f32v dot32(f32v acc, const float* a, const float* b) {
    return acc + load(a) * load(b) + load(a + LANES) * load(b + LANES);
}

inline f32v max(f32v a, f32v b) { return a > b ? a : b; }

// e^x for x <= 0, within 2 units in the last place of float32: 2^n with a polynomial for what is left of the exponent.
inline f32v exp_negative(f32v x) {
    x = x < -87.0f ? splat(-87.0f) : x;  // what is no number stays none
    f32v scaled = x * 1.44269504f;
    f32v shifted = scaled + 12582912.0f;  // 1.5 * 2^23: the integer is in the low bits
    f32v whole = shifted - 12582912.0f;
    f32v f = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
    f32v p = splat(1.0f / 720);
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    i32v exponent = ((i32v)shifted - 0x4B400000) << 23;
    return (f32v)((i32v)p + exponent);
}

inline f32v silu(f32v x) {
    f32v small = exp_negative(x < 0.0f ? x : -x);  // e^-|x|
    return x * (x < 0.0f ? small : splat(1.0f)) / (small + 1.0f);
}

// The share of [0, count) that falls to this thread, in whole multiples of `step`.
inline void my_share(long count, long step, long& begin, long& end) {
    long threads = omp_get_num_threads(), thread = omp_get_thread_num();
    long steps = (count + step - 1) / step;
    begin = std::min(count, steps * thread / threads * step);
    end = std::min(count, steps * (thread + 1) / threads * step);
}

}  // namespace
