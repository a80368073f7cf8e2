// Top-k's second pass: the logits of a few labels, document by document, to the bits of fanin_run.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

constexpr float LOWEST = std::numeric_limits<float>::lowest();

inline float product_added(float one, float other, float sum) {
#if defined(__x86_64__) && !defined(__FMA__)
    return sum + one * other;  // rounded twice, as fanin_run has to
#else
    return std::fma(one, other, sum);
#endif
}

// Logits of N labels for one document, from their biases in z, in the order of fanin_run: a label has two sums for G = 1, one in
// a group. `apart` is from one label's index to the next one's, 0 in a group. N labels side by side: a sum waits for its last addition.
// What is -inf becomes the lowest number, which what lies beyond the last label is not.
template <int N, int CHAINS>
void pick_labels(const float* own, const float* weight, const int32_t* index, int64_t apart, int64_t n, float* z) {
    float sum[N][CHAINS] = {};
    for (int l = 0; l < N; l++) sum[l][0] = z[l];
    int64_t k = 0;
    for (; k + CHAINS <= n; k += CHAINS)
        for (int l = 0; l < N; l++)
            for (int c = 0; c < CHAINS; c++)
                sum[l][c] = product_added(weight[l * n + k + c], own[index[l * apart + k + c]], sum[l][c]);
    for (int l = 0; l < N; l++) {
        if (k < n) sum[l][0] = product_added(weight[l * n + k], own[index[l * apart + k]], sum[l][0]);
        const float logit = CHAINS == 2 ? sum[l][0] + sum[l][1] : sum[l][0];
        z[l] = logit < LOWEST ? LOWEST : logit;
    }
}

}  // namespace
