// One panel of one group: small dense products on the K rows that its labels share.
#pragma once
#include <cstdint>
#include <type_traits>

#include "job.h"
#include "scratch.h"
#include "vectors.h"

namespace {

// How a block adds products to its sums: one float each, or two bfloat16 in a float's place, at twice the rate.
struct Floats {
    static vf add(vf sum, float one, vf other) { return sum + one * other; }
};
#ifdef BFLOAT16_UNITS
struct Pairs {
    static vf add(vf sum, float one, vf other) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(one), (__m512bh)other);
    }
};
#endif

// z[l] = bias[l] + sum_k weight[l][k] x[index[k]], for W vectors from column `at` on
template <int NV, int N, int W>
void block_logits(
    const float* x, const int32_t* index, const float* weight, int64_t stride, int64_t n, const float* bias, float* z, int at) {
    vf sum[N][W];
    for (int l = 0; l < N; l++)
        for (int v = 0; v < W; v++) sum[l][v] = splat(bias ? bias[l] : 0.0f);
    for (int64_t k = 0; k < n; k++)
        for (int v = 0; v < W; v++) {
            vf row = held(load(x + int64_t(index[k]) * (NV * LANES) + at + v * LANES));
            for (int l = 0; l < N; l++) sum[l][v] += weight[l * stride + k] * row;
        }
    for (int l = 0; l < N; l++)
        for (int v = 0; v < W; v++) save(z + l * PANEL + at + v * LANES, sum[l][v]);
}

// dw[l][k .. k + LANES KV) += sum_b g[l][b] turned[b][k ..], a row of g every `apart` floats
template <typename Products, int N, int KV>
void block_weight(const float* turned, const float* g, int64_t apart, int64_t columns, int64_t stride, float* dw) {
    vf sum[N][KV];
    for (int l = 0; l < N; l++)
        for (int v = 0; v < KV; v++) sum[l][v] = load(dw + l * stride + v * LANES);
    for (int64_t b = 0; b < columns; b++)
        for (int v = 0; v < KV; v++) {
            vf x = held(load(turned + b * stride + v * LANES));
            for (int l = 0; l < N; l++) sum[l][v] = Products::add(sum[l][v], g[l * apart + b], x);
        }
    for (int l = 0; l < N; l++)
        for (int v = 0; v < KV; v++) save(dw + l * stride + v * LANES, sum[l][v]);
}

// dx[index[j]] += sum_l weight[l][j] g[l] for N rows j and W vectors from column `at` on
template <typename Products, int NV, int N, int W>
void block_input(float* dx, const int32_t* index, const float* weight, int64_t stride, int64_t labels, const float* g, int at) {
    vf sum[N][W];
    for (int j = 0; j < N; j++)
        for (int v = 0; v < W; v++) sum[j][v] = vf{};
    for (int64_t l = 0; l < labels; l++)
        for (int v = 0; v < W; v++) {
            vf own = held(load(g + l * PANEL + at + v * LANES));
            for (int j = 0; j < N; j++) sum[j][v] = Products::add(sum[j][v], weight[l * stride + j], own);
        }
    for (int j = 0; j < N; j++)
        for (int v = 0; v < W; v++) {
            float* to = dx + int64_t(index[j]) * (NV * LANES) + at + v * LANES;
            save(to, load(to) + sum[j][v]);
        }
}

template <int NV>
void group_logits(const Job& job, Scratch& s, const float* x, int64_t members, const float* bias) {
    auto block = [&](auto labels, int64_t l) {
        in_blocks<NV, SUMS / 4>([&](auto w, int at) {
            block_logits<NV, labels, w>(
                x, s.index.data(), &s.weight[l * s.stride], s.stride, job.fan_in, bias ? bias + l : nullptr, &s.z[l * PANEL], at);
        });
    };
    int64_t l = 0;
    for (; l + 4 <= members; l += 4) block(std::integral_constant<int, 4>(), l);
    for (; l < members; l++) block(std::integral_constant<int, 1>(), l);
}

// As many sums at once as registers hold: fewer would wait for their own last addition.
template <typename Products, int N>
void weight_rows(Scratch& s, const float* g, int64_t apart, int64_t l, int64_t columns) {
    int64_t k = 0;
    for (; 4 * N <= SUMS && k + 4 * LANES <= s.stride; k += 4 * LANES)
        block_weight<Products, N, 4>(&s.turned[k], g + l * apart, apart, columns, s.stride, &s.dweight[l * s.stride + k]);
    for (; k + 2 * LANES <= s.stride; k += 2 * LANES)
        block_weight<Products, N, 2>(&s.turned[k], g + l * apart, apart, columns, s.stride, &s.dweight[l * s.stride + k]);
    for (; k < s.stride; k += LANES)
        block_weight<Products, N, 1>(&s.turned[k], g + l * apart, apart, columns, s.stride, &s.dweight[l * s.stride + k]);
}

template <typename Products>
void all_weight_rows(Scratch& s, const float* g, int64_t apart, int64_t members, int64_t columns) {
    int64_t l = 0;
    for (; SUMS >= 16 && l + 8 <= members; l += 8) weight_rows<Products, 8>(s, g, apart, l, columns);
    for (; l + 4 <= members; l += 4) weight_rows<Products, 4>(s, g, apart, l, columns);
    for (; l < members; l++) weight_rows<Products, 1>(s, g, apart, l, columns);
}

template <int NV>
void group_weight(Scratch& s, const float* x, int64_t members) {
    for (int64_t k = 0; k < s.stride; k += LANES)
        for (int v = 0; v < NV; v++) {
            vf square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = load(x + (int64_t(s.index[k + i]) * NV + v) * LANES);
            transpose(square);
            for (int i = 0; i < LANES; i++) save(&s.turned[(v * LANES + i) * s.stride + k], square[i]);
        }
    all_weight_rows<Floats>(s, s.z.data(), PANEL, members, NV * LANES);
}

// weight, g: a row each of `rows` labels, or pairs of labels
template <typename Products, int NV>
void group_input(const Job& job, Scratch& s, float* dx, const float* weight, const float* g, int64_t rows) {
    auto block = [&](auto features, int64_t k) {
        in_blocks<NV, SUMS / 4>([&](auto w, int at) {
            block_input<Products, NV, features, w>(dx, &s.index[k], weight + k, s.stride, rows, g, at);
        });
    };
    int64_t k = 0;
    for (; job.learnt == job.features && k + 4 <= job.fan_in; k += 4) block(std::integral_constant<int, 4>(), k);
    for (; k < job.fan_in; k++)
        if (s.index[k] < job.learnt) block(std::integral_constant<int, 1>(), k);
}

}  // namespace
