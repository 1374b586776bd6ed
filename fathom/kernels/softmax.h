// Log-probabilities of given tokens, and their gradients: rows of logits are passed over while they are in the cache.

#pragma once

#include "drawing.h"

namespace {

// What is kept of rows of logits [R, V] at a temperature: e^((logit - the row's largest) / temperature), rounded, and
// its sum; from these comes the gradient of any token's log-probability.
struct Softmaxed {
    const int64_t* targets;
    float* logprobs;   // of the row's target
    float* entropies;  // of the row, in nats
    float* totals;
    bf16* chances;  // null: not kept
};

inline void softmax_row(const float* row, long V, float inverse, const Softmaxed& out, long r) {
    alignas(64) float end[DRAWN_TOGETHER], kept[DRAWN_TOGETHER];
    float largest = largest_of(row, V);
    double total = 0, weighted = 0;
    for (long block = 0; block * DRAWN_TOGETHER < V; block++) {
        const float* logits = block_of(row, V, block, end);
        f32v acc = splat(0), acc_weighted = splat(0);
        for (long i = 0; i < DRAWN_TOGETHER; i += LANES) {
            f32v x = (load(logits + i) - largest) * inverse;
            f32v e = x < -87.0f ? splat(0) : exp_negative(x);
            store(kept + i, e);
            acc += e;
            acc_weighted += e * (x < -87.0f ? splat(0) : x);
        }
        total += sum(acc);
        weighted += sum(acc_weighted);
        if (!out.chances) continue;
        long first = block * DRAWN_TOGETHER, count = std::min(DRAWN_TOGETHER, V - first);
        bf16* chances = out.chances + r * V + first;
        long i = 0;
        for (; i + LANES <= count; i += LANES) store(chances + i, load(kept + i));
        for (; i < count; i++) chances[i] = narrow(kept[i]);
    }
    double log_total = std::log(total);
    out.logprobs[r] = float((row[out.targets[r]] - largest) * inverse - log_total);
    out.entropies[r] = float(log_total - weighted / total);  // neither is negative: a small entropy keeps its digits
    out.totals[r] = float(total);
}

void softmax_rows(const float* logits, float inverse, const Softmaxed& out, long R, long V) {
#pragma omp parallel for schedule(static) if (R > 1)
    for (long r = 0; r < R; r++) softmax_row(logits + r * V, V, inverse, out, r);
}

// gradients[i] = factors[i] * (onehot(targets[i]) - softmax of row rows[i]), bfloat16: what a gradient `factors` of
// log-probabilities asks of logits. The target's own part is made from its log-probability, of which nothing is lost.
void softmax_gradients(const bf16* chances, const int64_t* rows, const int64_t* targets, const float* totals,
                       const float* logprobs, const float* factors, bf16* gradients, long count, long V) {
#pragma omp parallel for schedule(static) if (count > 1)
    for (long i = 0; i < count; i++) {
        const bf16* from = chances + rows[i] * V;
        bf16* to = gradients + i * V;
        float factor = -factors[i] / totals[i];
        long v = 0;
        for (; v + LANES <= V; v += LANES) store(to + v, load(from + v) * factor);
        for (; v < V; v++) to[v] = narrow(widen(from[v]) * factor);
        to[targets[i]] = narrow(-factors[i] * std::expm1(logprobs[i]));
    }
}

}  // namespace
