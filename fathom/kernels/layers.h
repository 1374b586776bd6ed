// What stands between products: norms, rotation, pages; and whole dense decoders made of all of it.

#pragma once

#include "attention.h"

namespace {

template <typename T>
void rms_norm(const T* x, long ldx, const float* weight, T* y, long M, long D, float eps) {
#pragma omp parallel for if (M * D > 1 << 16)
    for (long m = 0; m < M; m++) {
        const T* row = x + m * ldx;
        double squares = 0;
        f32v acc = splat(0);
        long whole = D / LANES * LANES;
        for (long d = 0; d < whole; d += LANES) acc += load(row + d) * load(row + d);
        squares = sum(acc);
        for (long d = whole; d < D; d++) squares += to_float(row[d]) * to_float(row[d]);
        float scale = 1.0f / std::sqrt(float(squares / D) + eps);
        for (long d = 0; d < whole; d += LANES) store(y + m * D + d, load(row + d) * scale * load(weight + d));
        for (long d = whole; d < D; d++) assign(y[m * D + d], to_float(row[d]) * scale * weight[d]);
    }
}

// Rotates `heads` heads of each row, read in pairs or in halves, written in halves.
template <typename T>
void rotate(const T* x, long ldx, long head_stride, const float* cos, const float* sin, T* y, long M, long heads, long half,
            bool interleaved) {
#pragma omp parallel for if (M * heads * half > 1 << 17)
    for (long m = 0; m < M; m++)
        for (long h = 0; h < heads; h++) {
            const T* from = x + m * ldx + h * head_stride;
            T* to = y + (m * heads + h) * 2 * half;
            long i = 0;
            for (; !interleaved && i + LANES <= half; i += LANES) {
                f32v a = load(from + i), b = load(from + half + i), c = load(cos + m * half + i), s = load(sin + m * half + i);
                store(to + i, a * c - b * s);
                store(to + half + i, b * c + a * s);
            }
            for (; i < half; i++) {
                float a = to_float(from[interleaved ? 2 * i : i]), b = to_float(from[interleaved ? 2 * i + 1 : i + half]);
                float c = cos[m * half + i], s = sin[m * half + i];
                assign(to[i], a * c - b * s);
                assign(to[i + half], b * c + a * s);
            }
        }
}

// y[t, h] = w_h x[t, h]: every head has a matrix of its own.
template <typename Weights, typename T>
void heads_linear(const T* x, long ldx, Weights w, T* y, long tokens, long heads, long N, long K) {
    std::vector<typename Weights::Rows> rows;
    for (long h = 0; h < heads; h++) rows.emplace_back(x + h * ldx / heads, ldx, tokens, K);
    long panels = (N + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (long item = 0; item < heads * panels; item++) {
        long h = item / panels, p = item % panels;
        Weights matrix = w.at(panels * PANEL * h);
        tiles(tokens, [&](long m, auto count) {
            constexpr int C = decltype(count)::value;
            f32v out[C][2];
            matrix.template panel<C>(rows[h], m, p, out);
            put_tile<C>(out, p, N, [&](int c) { return y + ((m + c) * heads + h) * N; });
        });
    }
}


template <typename T>
void write_pages(const T* rows, long stride, T* pages, const int64_t* places, long tokens, long groups, long width) {
    for (long t = 0; t < tokens; t++)
        for (long g = 0; g < groups; g++)
            std::memcpy(pages + ((places[t] / PAGE * groups + g) * PAGE + places[t] % PAGE) * width,
                        rows + t * stride + g * width, width * sizeof(T));
}

template <typename T>
void add(T* x, const T* y, long count) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) store(x + i, load(x + i) + load(y + i));
    for (; i < count; i++) assign(x[i], to_float(x[i]) + to_float(y[i]));
}

// A layer as addresses, in this order (0 where there is none); `packing.py` fills them in.
template <typename T>
struct DenseLayer {
    const float* attention_norm;
    const void *qkv, *qkv_scales;
    const T* qkv_bias;
    const float *q_norm, *k_norm;
    T *keys, *values;
    const void *o, *o_scales;
    const T* o_bias;
    const float* feed_forward_norm;
    const void *gate_up, *gate_up_scales, *down, *down_scales;
};

struct DenseShape {
    long tokens, layers, hidden, heads, groups, head, inner, table_width;
};

// All layers over the tokens that fall to this thread, or to all threads together.
template <typename Weights, typename T>
void dense_slice(T* x, const DenseLayer<T>* layers, DenseShape s, const float* cos, const float* sin,
                  const int64_t* places, const int32_t* tables, const int32_t* visible, float scale, float eps) {
    long row = (s.heads + 2 * s.groups) * s.head, query = s.heads * s.head;
    std::vector<T> normed(s.tokens * s.hidden), qkv(s.tokens * row), q(s.tokens * query), attended(s.tokens * query),
        k(s.tokens * s.groups * s.head), inner(s.tokens * s.inner), added(s.tokens * s.hidden);
    auto product = [&](const T* from, long width, const void* w, const void* scales, const T* bias, T* to, long outputs) {
        typename Weights::Rows rows(from, width, s.tokens, width);
        linear(rows, Weights::of(w, scales, width), bias, to, s.tokens, outputs);
    };
    for (long n = 0; n < s.layers; n++) {
        const DenseLayer<T>& layer = layers[n];
        rms_norm(x, s.hidden, layer.attention_norm, normed.data(), s.tokens, s.hidden, eps);
        product(normed.data(), s.hidden, layer.qkv, layer.qkv_scales, layer.qkv_bias, qkv.data(), row);
        if (layer.q_norm)
            for (long t = 0; t < s.tokens; t++) {
                T *of_q = qkv.data() + t * row, *of_k = of_q + query;
                rms_norm(of_q, s.head, layer.q_norm, of_q, s.heads, s.head, eps);
                rms_norm(of_k, s.head, layer.k_norm, of_k, s.groups, s.head, eps);
            }
        rotate(qkv.data(), row, s.head, cos, sin, q.data(), s.tokens, s.heads, s.head / 2, false);
        rotate(qkv.data() + query, row, s.head, cos, sin, k.data(), s.tokens, s.groups, s.head / 2, false);
        write_pages(k.data(), s.groups * s.head, layer.keys, places, s.tokens, s.groups, s.head);
        write_pages(qkv.data() + query + s.groups * s.head, row, layer.values, places, s.tokens, s.groups, s.head);
        long page = s.groups * PAGE * s.head;
        // A token may see keys of another slice.
#pragma omp barrier
        paged_attention(q.data(), layer.keys, layer.values, attended.data(), tables, visible, s.tokens, s.heads, s.groups,
                        s.head, s.head, page, page, s.head, s.head, s.table_width, scale);
        product(attended.data(), query, layer.o, layer.o_scales, layer.o_bias, added.data(), s.hidden);
        add(x, added.data(), s.tokens * s.hidden);
        rms_norm(x, s.hidden, layer.feed_forward_norm, normed.data(), s.tokens, s.hidden, eps);
        swiglu(typename Weights::Rows(normed.data(), s.hidden, s.tokens, s.hidden),
               Weights::of(layer.gate_up, layer.gate_up_scales, s.hidden), inner.data(), s.tokens, s.inner);
        product(inner.data(), s.inner, layer.down, layer.down_scales, (const T*)nullptr, added.data(), s.hidden);
        add(x, added.data(), s.tokens * s.hidden);
    }
}

// All layers of a Llama or Qwen decoder over single tokens x [T, hidden], in place: what the modules compute, by the
// same functions in the same order, without going back to Python four hundred times.
//
// With many tokens each thread takes its share of them through all layers instead of its share of every product's outputs:
// what one core has just written another one would fetch line by line, five times a layer.
template <typename Weights, typename T>
void dense_layers(T* x, const DenseLayer<T>* layers, DenseShape s, const float* cos, const float* sin,
                  const int64_t* places, const int32_t* tables, const int32_t* visible, float scale, float eps) {
    // Not `parallel if`: within a region of one thread libgomp starts new threads for every loop.
    if (s.tokens < 2 * ROWS * omp_get_max_threads())
        return dense_slice<Weights>(x, layers, s, cos, sin, places, tables, visible, scale, eps);
#pragma omp parallel
    {
        long begin, end;
        my_share(s.tokens, ROWS, begin, end);
        DenseShape slice = s;
        slice.tokens = end - begin;
        dense_slice<Weights>(x + begin * s.hidden, layers, slice, cos + begin * s.head / 2, sin + begin * s.head / 2,
                             places + begin, tables + begin * s.table_width, visible + begin, scale, eps);
    }
}

}  // namespace
