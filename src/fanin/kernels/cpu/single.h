// One panel of one label (G = 1).
#pragma once
#include <cstdint>

#include "vectors.h"

namespace {

// For the W vectors from column `at` on; then for a whole panel.
template <int NV, int W>
void single_logits(const float* x, const int32_t* index, const float* weight, int64_t n, float bias, float* z, int at) {
    vf even[W], odd[W];
    for (int v = 0; v < W; v++) even[v] = splat(bias), odd[v] = vf{};
    x += at;
    int64_t k = 0;
    for (; k + 2 <= n; k += 2) {
        const float *one = x + int64_t(index[k]) * (NV * LANES), *two = x + int64_t(index[k + 1]) * (NV * LANES);
        for (int v = 0; v < W; v++) even[v] += weight[k] * load(one + v * LANES);
        for (int v = 0; v < W; v++) odd[v] += weight[k + 1] * load(two + v * LANES);
    }
    if (k < n)
        for (int v = 0; v < W; v++) even[v] += weight[k] * load(x + int64_t(index[k]) * (NV * LANES) + v * LANES);
    for (int v = 0; v < W; v++) save(z + at + v * LANES, even[v] + odd[v]);
}

template <int NV>
void single_logits(const float* x, const int32_t* index, const float* weight, int64_t n, float bias, float* z) {
    in_blocks<NV, 4>([&](auto w, int at) { single_logits<NV, w>(x, index, weight, n, bias, z, at); });
}

template <int NV, bool DX, bool DW>
void single_gradients(
    const float* x, float* dx, int64_t learnt, const int32_t* index, const float* weight, int64_t n, const float* z, float* dw) {
    vf g[NV];
    for (int v = 0; v < NV; v++) g[v] = load(z + v * LANES);
    for (int64_t k = 0; k < n; k += LANES) {
        vf sums[LANES];
        int64_t stop = n - k < LANES ? n - k : LANES;
        auto one = [&](int64_t j) {
            int64_t row = int64_t(index[k + j]) * (NV * LANES);
            if (DW) {
                vf even = g[0] * load(x + row), odd = {};  // two: one sum would wait for its own last addition
                for (int v = 1; v < NV; v += 2) odd += g[v] * load(x + row + v * LANES);
                for (int v = 2; v < NV; v += 2) even += g[v] * load(x + row + v * LANES);
                sums[j] = even + odd;
            }
            if (DX && index[k + j] < learnt) {
                const vf own = splat(weight[k + j]);  // once: dx might lie where it does, for all that a compiler knows
                for (int v = 0; v < NV; v++) {
                    float* to = dx + row + v * LANES;
                    save(to, load(to) + own * g[v]);
                }
            }
        };
        if (stop == LANES) {
#pragma GCC unroll 16
            for (int64_t j = 0; j < LANES; j++) one(j);
            if (DW) save(dw + k, load(dw + k) + totals(sums));
        } else {
            for (int64_t j = 0; j < stop; j++) one(j);
            if (DW)
                for (int64_t j = 0; j < stop; j++) dw[k + j] += total(sums[j]);
        }
    }
}

}  // namespace
