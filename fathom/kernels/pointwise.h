// Training's pointwise maps and norms, forward and backward: each a single pass where tensor operations make ten.

#pragma once

#include <vector>

#include "layers.h"

namespace {

// Gradients of y = x / rms(x) * weight, rows of D: dx, and dweight summed over all rows.
template <typename T>
void rms_norm_backward(const T* dy, const T* x, const float* weight, T* dx, float* dweight, long M, long D, float eps) {
    std::vector<std::vector<float>> sums(omp_get_max_threads());
#pragma omp parallel
    {
        std::vector<float>& own = sums[omp_get_thread_num()];
        own.assign(D, 0.0f);
        long begin, end, whole = D / LANES * LANES;
        my_share(M, 1, begin, end);
        for (long m = begin; m < end; m++) {
            const T *row = x + m * D, *up = dy + m * D;
            f32v squares = splat(0), products = splat(0);
            for (long d = 0; d < whole; d += LANES) {
                f32v v = load(row + d);
                squares += v * v;
                products += v * load(up + d) * load(weight + d);
            }
            double square = sum(squares), product = sum(products);
            for (long d = whole; d < D; d++) {
                square += to_float(row[d]) * to_float(row[d]);
                product += to_float(row[d]) * to_float(up[d]) * weight[d];
            }
            float scale = 1.0f / std::sqrt(float(square / D) + eps);
            float along = float(product / D) * scale * scale * scale;
            for (long d = 0; d < whole; d += LANES) {
                f32v v = load(row + d), u = load(up + d);
                store(own.data() + d, load(own.data() + d) + u * v * scale);
                store(dx + m * D + d, u * load(weight + d) * scale - v * along);
            }
            for (long d = whole; d < D; d++) {
                float v = to_float(row[d]), u = to_float(up[d]);
                own[d] += u * v * scale;
                assign(dx[m * D + d], u * weight[d] * scale - v * along);
            }
        }
    }
    std::fill(dweight, dweight + D, 0.0f);
    for (const std::vector<float>& own : sums)  // in the order of threads, so that a run repeats to the bit
        for (long d = 0; d < long(own.size()); d++) dweight[d] += own[d];
}

// y = silu(gate) * up.
template <typename T>
void gated(const T* gate, const T* up, T* y, long count) {
#pragma omp parallel for if (count > 1 << 16)
    for (long i = 0; i < count / LANES; i++)
        store(y + i * LANES, silu(load(gate + i * LANES)) * load(up + i * LANES));
    for (long i = count / LANES * LANES; i < count; i++)
        assign(y[i], silu(splat(to_float(gate[i])))[0] * to_float(up[i]));
}

// Its gradients. silu(g) = g s with s = 1 / (1 + e^-g), so its slope is s + silu(g) (1 - s).
inline void gated_gradient(f32v dy, f32v gate, f32v up, f32v& dgate, f32v& dup) {
    f32v far = exp_negative(gate < 0.0f ? gate : -gate);  // e^-|g|
    f32v sigmoid = (gate < 0.0f ? far : splat(1.0f)) / (1.0f + far);
    dup = dy * gate * sigmoid;
    dgate = dy * up * (sigmoid + gate * sigmoid * (1.0f - sigmoid));
}

template <typename T>
void gated_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, long count) {
    f32v for_gate, for_up;
#pragma omp parallel for private(for_gate, for_up) if (count > 1 << 16)
    for (long i = 0; i < count / LANES; i++) {
        gated_gradient(load(dy + i * LANES), load(gate + i * LANES), load(up + i * LANES), for_gate, for_up);
        store(dgate + i * LANES, for_gate);
        store(dup + i * LANES, for_up);
    }
    for (long i = count / LANES * LANES; i < count; i++) {
        gated_gradient(splat(to_float(dy[i])), splat(to_float(gate[i])), splat(to_float(up[i])), for_gate, for_up);
        assign(dgate[i], for_gate[0]);
        assign(dup[i], for_up[0]);
    }
}

}  // namespace
