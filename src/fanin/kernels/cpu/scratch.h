// What a thread works with: one unit's rows, their gradients, its panel of logits.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "job.h"
#include "vectors.h"

namespace {

constexpr int LINE = 16, PANEL = 64;  // floats in a cache line, to which panels are filled up; documents in a whole panel

// Floats from a cache line's start on: a vector across two lines costs two accesses.
class Lines {
    struct alignas(64) Line { float values[LINE]; };
    std::vector<Line> lines;

public:
    void assign(int64_t n, float value) {
        lines.resize((n + LINE - 1) / LINE);
        std::fill(data(), data() + lines.size() * LINE, value);
    }
    float* data() { return lines.empty() ? nullptr : lines[0].values; }
    const float* data() const { return lines.empty() ? nullptr : lines[0].values; }
    float& operator[](int64_t i) { return data()[i]; }
};

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Scratch {
    int64_t stride;  // K rounded up to whole vectors, or to whole tiles
    Lines weight, dweight, turned, z, dbias, dense, best;
    Lines pairs_k, pairs_l, rows, g_columns, g_labels;  // of two bfloat16 each, for BFLOAT16_UNITS
    Lines pairs_turned, tile;                           // for MATRIX_UNIT
    std::vector<int32_t> index;
    // a label's entries whose features are present, where some are not
    Lines own_weight, own_dweight;
    std::vector<int32_t> own_index, place;
    int64_t own = 0;

    explicit Scratch(const Job& job) : stride(rounded_up(job.fan_in, by_matrix_unit(job) ? 2 * LANES : LANES)) {
        weight.assign(job.group * stride, 0.0f);
        dweight.assign(job.group * stride, 0.0f);
        index.assign(stride, 0);  // beyond K it stays 0: some row is read there, with weight 0
        z.assign(job.group * PANEL, 0.0f);
        dbias.assign(job.group, 0.0f);
        if (job.group > 1) turned.assign(PANEL * stride, 0.0f);
        if (in_bfloat16(job)) {
            const int64_t couples = (job.group + 1) / 2;
            pairs_k.assign(job.group * stride / 2, 0.0f), pairs_l.assign(couples * stride, 0.0f);
            rows.assign(stride / 2 * PANEL, 0.0f);
            g_columns.assign(job.group * PANEL / 2, 0.0f), g_labels.assign(couples * PANEL, 0.0f);
            if (by_matrix_unit(job)) pairs_turned.assign(couples * stride, 0.0f), tile.assign(LANES * LANES, 0.0f);
        }
        if (job.present) {
            own_weight.assign(stride, 0.0f), own_dweight.assign(stride, 0.0f);
            own_index.assign(stride, 0), place.assign(stride, 0);
        }
        if (job.mode == CANDIDATES) {
            dense.assign(job.group * ((job.features + LANES - 1) / LANES * LANES), 0.0f);
            best.assign(job.count, 0.0f);
        }
    }
};

}  // namespace
