// One panel of one group in bfloat16, on processors that multiply pairs of them: what the blocks of grouped.h take then. x and g
// are rounded here; the weights are such numbers already. A pair is two features (logits), two documents (dW) or two labels (dx),
// and lies in a float's place.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "grouped.h"
#include "job.h"
#include "scratch.h"
#include "vectors.h"

namespace {

#ifdef BFLOAT16_UNITS
// a's sixteen values, then b's
inline vf rounded(vf a, vf b) { return (vf)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }

// a0 b0 a1 b1 ..
inline vf coupled(vf a, vf b) {
    alignas(64) static const int16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vf)_mm512_permutexvar_epi16(_mm512_load_si512(ORDER), (__m512i)rounded(a, b));
}

void pair_weights(Scratch& s, int64_t members) {
    for (int64_t l = 0; l < members; l++)
        for (int64_t k = 0; k < s.stride; k += LANES) {
            __m256bh pairs = _mm512_cvtneps_pbh((__m512)load(&s.weight[l * s.stride + k]));
            std::memcpy(&s.pairs_k[(l * s.stride + k) / 2], &pairs, sizeof pairs);
        }
    for (int64_t l = 0; l < members; l += 2)
        for (int64_t k = 0; k < s.stride; k += LANES) {
            vf other = l + 1 < members ? load(&s.weight[(l + 1) * s.stride + k]) : vf{};
            save(&s.pairs_l[l / 2 * s.stride + k], coupled(load(&s.weight[l * s.stride + k]), other));
        }
}

template <int NV, int N, int W>
void paired_logits_block(const Scratch& s, const float* pairs, int64_t couples, const float* bias, float* z, int at) {
    vf sum[N][W];
    for (int l = 0; l < N; l++)
        for (int v = 0; v < W; v++) sum[l][v] = splat(bias ? bias[l] : 0.0f);
    for (int64_t k = 0; k < couples; k++)
        for (int v = 0; v < W; v++) {
            vf row = load(s.rows.data() + k * PANEL + at + v * LANES);
            for (int l = 0; l < N; l++) sum[l][v] = Pairs::add(sum[l][v], pairs[l * s.stride / 2 + k], row);
        }
    for (int l = 0; l < N; l++)
        for (int v = 0; v < W; v++) save(z + l * PANEL + at + v * LANES, sum[l][v]);
}

template <int NV>
void pair_rows(const Job& job, Scratch& s, const float* x) {
    for (int64_t k = 0; k < (job.fan_in + 1) / 2; k++) {
        const float *one = x + int64_t(s.index[2 * k]) * (NV * LANES), *two = x + int64_t(s.index[2 * k + 1]) * (NV * LANES);
        for (int v = 0; v < NV; v++)
            save(&s.rows[k * PANEL + v * LANES], coupled(load(one + v * LANES), load(two + v * LANES)));
    }
}

template <int NV>
void paired_logits(const Job& job, Scratch& s, int64_t members, const float* bias) {
    const int64_t couples = (job.fan_in + 1) / 2;
    auto block = [&](auto labels, int64_t l) {
        in_blocks<NV, 4>([&](auto w, int at) {
            paired_logits_block<NV, labels, w>(
                s, &s.pairs_k[l * s.stride / 2], couples, bias ? bias + l : nullptr, &s.z[l * PANEL], at);
        });
    };
    int64_t l = 0;
    for (; l + 4 <= members; l += 4) block(std::integral_constant<int, 4>(), l);
    for (; l < members; l++) block(std::integral_constant<int, 1>(), l);
}

template <int NV>
void pair_gradients(Scratch& s, int64_t members) {
    for (int64_t l = 0; l < members; l++) {
        const float* own = &s.z[l * PANEL];
        for (int v = 0; v < NV; v += 2)
            save(&s.g_columns[(l * PANEL + v * LANES) / 2],
                 rounded(load(own + v * LANES), v + 1 < NV ? load(own + (v + 1) * LANES) : vf{}));
        for (int v = 0; l % 2 == 0 && v < NV; v++)
            save(&s.g_labels[l / 2 * PANEL + v * LANES],
                 coupled(load(own + v * LANES), l + 1 < members ? load(own + PANEL + v * LANES) : vf{}));
    }
}

template <int NV>
void turn_pairs(Scratch& s, const float* x) {
    for (int64_t k = 0; k < s.stride; k += LANES)
        for (int v = 0; v < NV; v += 2) {
            vf square[LANES];
            for (int i = 0; i < LANES; i++) {
                const float* row = x + (int64_t(s.index[k + i]) * NV + v) * LANES;
                square[i] = rounded(load(row), v + 1 < NV ? load(row + LANES) : vf{});
            }
            transpose(square);
            for (int i = 0; i < (v + 1 < NV ? LANES : LANES / 2); i++)
                save(&s.turned[(v * LANES / 2 + i) * s.stride + k], square[i]);
        }
}
#endif

}  // namespace
