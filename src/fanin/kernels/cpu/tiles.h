// The products of paired.h by the processor's matrix unit (AMX), where it has one: sixteen rows of sixteen pairs at a time.
//
// Labels come in sixteens there; a group of fewer, and the last labels of a layer, are multiplied pair by pair.
#pragma once
#include <cstdint>

#include "job.h"
#include "paired.h"
#include "scratch.h"
#include "vectors.h"

namespace {

#ifdef MATRIX_UNIT
constexpr int ROW = 4 * LANES;  // bytes of a tile's row

// What is written in `place`, or where it points to, is in memory: GCC's tile loads do not say that they read it.
inline void settle(const void* place) { asm volatile("" : : "r"(place) : "memory"); }

inline bool in_tiles(const Job& job, int64_t members) { return members % LANES == 0 && by_matrix_unit(job); }

// Tiles 0 to 3 are sums, 4 a left and 5 a right factor; 6 and 7 the same with half as many pairs. This thread's, while it lives.
class TileSettings {
    bool used;

public:
    explicit TileSettings(const Job& job) : used(by_matrix_unit(job)) {
        if (!used) return;
        alignas(64) struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } wanted = {};
        wanted.palette = 1;
        for (int tile = 0; tile < 8; tile++) wanted.bytes[tile] = ROW, wanted.rows[tile] = LANES;
        wanted.bytes[6] = ROW / 2, wanted.rows[7] = LANES / 2;
        settle(&wanted);
        _tile_loadconfig(&wanted);
    }
    ~TileSettings() { if (used) _tile_release(); }
    TileSettings(const TileSettings&) = delete;
};

// pairs_turned[k][l / 2]: what pairs_l holds, features by pairs of labels
inline void turn_weights(Scratch& s, int64_t members) {
    const int64_t apart = members / 2;
    for (int64_t l = 0; l < members / 2; l += LANES / 2)
        for (int64_t k = 0; k < s.stride; k += LANES) {
            vf square[LANES] = {};
            for (int i = 0; i < LANES / 2; i++) square[i] = load(&s.pairs_l[(l + i) * s.stride + k]);
            transpose(square);
            for (int i = 0; i < LANES; i++) std::memcpy(&s.pairs_turned[(k + i) * apart + l], &square[i], ROW / 2);
        }
}

// z[l] = bias[l] + sum_k weight[l][k] x[index[k]]; the bias comes last, as a tile waits long for what has just been written
template <int NV>
void tile_logits(Scratch& s, int64_t members, const float* bias) {
    for (int64_t l = 0; l < members; l += LANES) {
        float* z = &s.z[l * PANEL];
        settle(&s);
        _tile_zero(0);
        if constexpr (NV > 1) _tile_zero(1);
        if constexpr (NV > 2) _tile_zero(2);
        if constexpr (NV > 3) _tile_zero(3);
        for (int64_t k = 0; k < s.stride / 2; k += LANES) {  // pairs
            const float* rows = &s.rows[k * PANEL];
            _tile_loadd(4, &s.pairs_k[l * s.stride / 2 + k], 2 * s.stride);
            _tile_loadd(5, rows, 4 * PANEL);
            _tile_dpbf16ps(0, 4, 5);
            if constexpr (NV > 1) { _tile_loadd(5, rows + LANES, 4 * PANEL); _tile_dpbf16ps(1, 4, 5); }
            if constexpr (NV > 2) { _tile_loadd(5, rows + 2 * LANES, 4 * PANEL); _tile_dpbf16ps(2, 4, 5); }
            if constexpr (NV > 3) { _tile_loadd(5, rows + 3 * LANES, 4 * PANEL); _tile_dpbf16ps(3, 4, 5); }
        }
        _tile_stored(0, z, 4 * PANEL);
        if constexpr (NV > 1) _tile_stored(1, z + LANES, 4 * PANEL);
        if constexpr (NV > 2) _tile_stored(2, z + 2 * LANES, 4 * PANEL);
        if constexpr (NV > 3) _tile_stored(3, z + 3 * LANES, 4 * PANEL);
        for (int i = 0; bias && i < LANES; i++)
            for (int v = 0; v < NV; v++) save(z + i * PANEL + v * LANES, load(z + i * PANEL + v * LANES) + bias[l + i]);
    }
}

// dw[l] += sum_b g[l][b] x[.][b]
template <int NV>
void tile_weight(Scratch& s, int64_t members) {
    settle(&s);
    for (int64_t l = 0; l < members; l += LANES)
        for (int64_t k = 0; k < s.stride; k += 2 * LANES) {
            float* dw = &s.dweight[l * s.stride + k];
            _tile_loadd(0, dw, 4 * s.stride);
            _tile_loadd(1, dw + LANES, 4 * s.stride);
            for (int v = 0; v + 1 < NV; v += 2) {
                const float* turned = &s.turned[v * LANES / 2 * s.stride + k];
                _tile_loadd(4, &s.g_columns[(l * PANEL + v * LANES) / 2], 2 * PANEL);
                _tile_loadd(5, turned, 4 * s.stride);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(5, turned + LANES, 4 * s.stride);
                _tile_dpbf16ps(1, 4, 5);
            }
            if constexpr (NV % 2) {  // sixteen documents are left
                const float* turned = &s.turned[(NV - 1) * LANES / 2 * s.stride + k];
                _tile_loadd(6, &s.g_columns[(l * PANEL + (NV - 1) * LANES) / 2], 2 * PANEL);
                _tile_loadd(7, turned, 4 * s.stride);
                _tile_dpbf16ps(0, 6, 7);
                _tile_loadd(7, turned + LANES, 4 * s.stride);
                _tile_dpbf16ps(1, 6, 7);
            }
            _tile_stored(0, dw, 4 * s.stride);
            _tile_stored(1, dw + LANES, 4 * s.stride);
        }
}

// dx[index[k]] += sum_l weight[l][k] g[l]
template <int NV>
void tile_input(const Job& job, Scratch& s, float* dx, int64_t members) {
    settle(&s);
    for (int64_t k = 0; k < job.fan_in; k += LANES)
        for (int v = 0; v < NV; v++) {
            _tile_zero(0);
            for (int64_t l = 0; l < members / 2; l += LANES / 2) {  // pairs
                _tile_loadd(6, &s.pairs_turned[k * (members / 2) + l], 2 * members);
                _tile_loadd(7, &s.g_labels[l * PANEL + v * LANES], 4 * PANEL);
                _tile_dpbf16ps(0, 6, 7);
            }
            _tile_stored(0, s.tile.data(), ROW);
            for (int64_t i = 0; i < LANES && k + i < job.fan_in; i++)
                if (s.index[k + i] < job.learnt) {
                    float* to = dx + int64_t(s.index[k + i]) * (NV * LANES) + v * LANES;
                    save(to, load(to) + load(&s.tile[i * LANES]));
                }
        }
}
#else
constexpr bool in_tiles(const Job&, int64_t) { return false; }
struct TileSettings { explicit TileSettings(const Job&) {} };
#ifdef BFLOAT16_UNITS
inline void turn_weights(Scratch&, int64_t) {}
template <int NV>
void tile_logits(Scratch&, int64_t, const float*) {}
template <int NV>
void tile_weight(Scratch&, int64_t) {}
template <int NV>
void tile_input(const Job&, Scratch&, float*, int64_t) {}
#endif
#endif

}  // namespace
