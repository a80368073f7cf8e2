// The fixed fan-in layer on a CPU, label by label (G = 1) or group by group, all in one pass.
//
// The batch is cut into panels of up to 64 documents. A panel of activations lies feature by feature, [D][64] floats, so a
// feature that a label reads is four cache lines in a row. For each label: logits from K rows, their gradient in registers,
// then its part of dW and dx while the rows are still in the first-level cache, then the update in place.
//
// Labels are cut into slices, a number that depends on the shapes alone; each slice sums into a dx of its own, and these are
// added in order. So the result does not depend on how many threads there are.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "candidates.h"
#include "grouped.h"
#include "job.h"
#include "loss.h"
#include "paired.h"
#include "pick.h"
#include "scratch.h"
#include "single.h"
#include "storage.h"
#include "tiles.h"
#include "update.h"
#include "vectors.h"

namespace {

// One unit (a label, or a group) on one panel; the rows of s.z are its labels.
template <int NV, bool GROUPED>
double panel(const Job& job, Scratch& s, int64_t number, int64_t label, int64_t members, float* slice_dx, const Range* positives) {
    const int64_t column = number * PANEL, offset = column * job.features;
    const int64_t width = job.batch - column < NV * LANES ? job.batch - column : NV * LANES;
    const float* x = job.x + offset;
    float* dx = slice_dx ? slice_dx + column * job.learnt : nullptr;
    const int32_t* index = job.present ? s.own_index.data() : s.index.data();
    const float* weight = job.present ? s.own_weight.data() : s.weight.data();
    float* dweight = job.present ? s.own_dweight.data() : s.dweight.data();
    const int64_t n = job.present ? s.own : job.fan_in;
    if (job.mode == GRADIENTS) {
        for (int64_t l = 0; l < members; l++) {
            std::memcpy(&s.z[l * PANEL], job.z + (label + l) * job.batch + column, width * sizeof(float));
            for (int64_t i = width; i < NV * LANES; i++) s.z[l * PANEL + i] = 0;
        }
#ifdef BFLOAT16_UNITS
    } else if (in_bfloat16(job)) {
        const float* bias = job.bias ? job.bias + label : nullptr;
        pair_rows<NV>(job, s, x);
        if (in_tiles(job, members)) tile_logits<NV>(s, members, bias);
        else paired_logits<NV>(job, s, members, bias);
#endif
    } else if constexpr (GROUPED) {
        group_logits<NV>(job, s, x, members, job.bias ? job.bias + label : nullptr);
    } else {
        single_logits<NV>(x, index, weight, n, job.bias ? job.bias[label] : 0.0f, s.z.data());
    }
    double loss = 0;
    if (job.mode == LOGITS) {
        for (int64_t l = 0; l < members; l++)
            std::memcpy(job.z + (label + l) * job.batch + column, &s.z[l * PANEL], width * sizeof(float));
        return 0;
    }
    if (job.mode == MAXIMA) {
        for (int64_t l = 0; l < members; l++) {
            float* to = job.z + (label + l) / job.tile * job.batch + column;
            for (int64_t i = 0; i < width; i++) to[i] = s.z[l * PANEL + i] > to[i] ? s.z[l * PANEL + i] : to[i];
        }
        return 0;
    }
    if (job.mode == CANDIDATES) {
        for (int64_t l = 0; l < members; l++) {
            logit_gradient<NV>(job, &s.z[l * PANEL], column, width, positives[l], false);
            add_dense_gradient<NV>(job, s, x, l);
        }
        return 0;
    }
    if (job.mode == STEP)
        for (int64_t l = 0; l < members; l += LANES) {
            vf sums[LANES] = {};
            const int64_t some = members - l < LANES ? members - l : LANES;
            for (int64_t j = 0; j < some; j++) {
                float* z = &s.z[(l + j) * PANEL];
                loss += logit_gradient<NV>(job, z, column, width, positives[l + j], job.losses != nullptr);
                sums[j] = load(z);
                for (int v = 1; v < NV; v++) sums[j] += load(z + v * LANES);
            }
            if (some == 1) s.dbias[l] += total(sums[0]);
            else save(&s.dbias[l], load(&s.dbias[l]) + totals(sums));
        }
    const bool dw = job.mode == STEP || job.dweight;
#ifdef BFLOAT16_UNITS
    if (in_bfloat16(job)) {
        pair_gradients<NV>(s, members);
        turn_pairs<NV>(s, x);
        if (in_tiles(job, members)) {
            tile_weight<NV>(s, members);
            if (dx) tile_input<NV>(job, s, dx, members);
            return loss;
        }
        all_weight_rows<Pairs>(s, s.g_columns.data(), PANEL / 2, members, NV * LANES / 2);
        if (dx) group_input<Pairs, NV>(job, s, dx, s.pairs_l.data(), s.g_labels.data(), (members + 1) / 2);
        return loss;
    }
#endif
    if constexpr (GROUPED) {
        if (dw) group_weight<NV>(s, x, members);
        if (dx) group_input<Floats, NV>(job, s, dx, s.weight.data(), s.z.data(), members);
    } else if (dw && dx) {
        single_gradients<NV, true, true>(x, dx, job.learnt, index, weight, n, s.z.data(), dweight);
    } else if (dw) {
        single_gradients<NV, false, true>(x, dx, job.learnt, index, weight, n, s.z.data(), dweight);
    } else {
        single_gradients<NV, true, false>(x, dx, job.learnt, index, weight, n, s.z.data(), dweight);
    }
    return loss;
}

void run_slice(const Job& job, Scratch& s, int64_t slice, int64_t stop_of(const Job&, int64_t)) {
    const int64_t begin = slice ? stop_of(job, slice - 1) : 0, end = stop_of(job, slice), n = job.fan_in;
    const int64_t padded = (job.batch + LINE - 1) / LINE * LINE, panels = (padded + PANEL - 1) / PANEL;
    const int64_t padded_features = (job.features + LANES - 1) / LANES * LANES;
    float* dx = job.dx ? job.dx + slice * padded * job.learnt : nullptr;
    if (dx) std::memset(dx, 0, padded * job.learnt * sizeof(float));
    if (job.mode == MAXIMA)
        for (int64_t t = begin / job.tile; t * job.tile < end; t++)
            for (int64_t b = 0; b < job.batch; b++) job.z[t * job.batch + b] = -std::numeric_limits<float>::infinity();
    int64_t next = 0;  // of the positives
    const bool with_positives = job.mode == STEP || job.mode == CANDIDATES;
    if (with_positives) {
        int64_t high = job.positives;
        while (next < high) {
            int64_t middle = (next + high) / 2;
            if (job.positive_labels[middle] < begin) next = middle + 1; else high = middle;
        }
    }
    std::vector<Range> positives(job.group);
    double loss = 0;
    for (int64_t label = begin; label < end; label += job.group) {
        const int64_t members = end - label < job.group ? end - label : job.group;
        const int64_t rows = s.stride == n ? members : 1;  // that lie one after the other in s.weight too
        indices(job.index, job.index_type, label / job.group * n, n, s.index.data());
        if (job.mode == STEP) {
            const int64_t next = label + members, entries = std::min(end - next, members) * n;
            fetch(job.weight, job.weight_type, next * n, entries);
            fetch(job.momentum, job.momentum_type, next * n, entries);
            if (next < end) fetch(job.index, job.index_type, next / job.group * n, n);
        }
        for (int64_t l = 0; l < members; l += rows)
            decode(job.weight, job.weight_type, (label + l) * n, rows * n, &s.weight[l * s.stride]);
#ifdef BFLOAT16_UNITS
        if (in_bfloat16(job)) {
            pair_weights(s, members);
            if (in_tiles(job, members)) turn_weights(s, members);
        }
#endif
        if (with_positives)
            for (int64_t l = 0; l < members; l++) {
                positives[l].begin = next;
                while (next < job.positives && job.positive_labels[next] == label + l) next++;
                positives[l].end = next;
            }
        s.dbias.assign(job.group, 0.0f);
        if (job.mode == CANDIDATES) s.dense.assign(job.group * padded_features, 0.0f);
        if (job.mode == STEP || job.dweight) std::memset(s.dweight.data(), 0, members * s.stride * sizeof(float));
        if (job.present) {
            s.own = 0;
            for (int64_t k = 0; k < n; k++)
                if (job.present[s.index[k]])
                    s.own_index[s.own] = s.index[k], s.own_weight[s.own] = s.weight[k], s.place[s.own++] = int32_t(k);
            std::memset(s.own_dweight.data(), 0, s.own * sizeof(float));
        }
        for (int64_t p = 0; p < panels; p++) {
            const int64_t lines = (padded - p * PANEL) / LINE;
            constexpr int NV = LINE / LANES;  // of a line
            auto whole = [&](auto nv) {
                if (job.group > 1) loss += panel<nv, true>(job, s, p, label, members, dx, positives.data());
                else loss += panel<nv, false>(job, s, p, label, members, dx, positives.data());
            };
            if (lines >= 4) whole(std::integral_constant<int, 4 * NV>());
            else if (lines == 3) whole(std::integral_constant<int, 3 * NV>());
            else if (lines == 2) whole(std::integral_constant<int, 2 * NV>());
            else whole(std::integral_constant<int, NV>());
        }
        for (int64_t k = 0; job.present && k < s.own; k++) s.dweight[s.place[k]] = s.own_dweight[k];
        if (job.mode == CANDIDATES) choose_candidates(job, s, members, job.candidates + label / job.group * job.count);
        for (int64_t l = 0; l < members; l += rows) {
            if (job.mode == STEP) update_rows(job, label + l, rows, &s.weight[l * s.stride], &s.dweight[l * s.stride]);
            else if (job.dweight) std::memcpy(job.dweight + (label + l) * n, &s.dweight[l * s.stride], rows * n * sizeof(float));
        }
        if (job.mode == STEP && job.bias)
            for (int64_t l = 0; l < members; l++) update_bias(job, label + l, s.dbias[l]);
    }
    if (job.losses) job.losses[slice] = loss;
}

// Slices end at whole tiles (a tile is whole groups), so that no two threads share one.
int64_t end_of_slice(const Job& job, int64_t slice) {
    const int64_t tiles = (job.labels + job.tile - 1) / job.tile, end = tiles * (slice + 1) / job.slices * job.tile;
    return end < job.labels ? end : job.labels;
}

}  // namespace

extern "C" int64_t fanin_bfloat16_units() {
#ifdef BFLOAT16_UNITS
    return 1;
#else
    return 0;
#endif
}

extern "C" void fanin_run(const Job* given) {
    const Job& job = *given;
#pragma omp parallel num_threads(job.threads)
    {
        Scratch scratch(job);
        TileSettings tiles(job);
#pragma omp for schedule(dynamic, 1)
        for (int64_t slice = 0; slice < job.slices; slice++) run_slice(job, scratch, slice, end_of_slice);
    }
    if (!job.dx) return;
    const int64_t size = (job.batch + LINE - 1) / LINE * LINE * job.learnt;
    constexpr int64_t RUN = 32 * LINE;  // lines in a row of one slice, then of the next: prefetching follows few streams
#pragma omp parallel for num_threads(job.threads) schedule(static)
    for (int64_t begin = 0; begin < size; begin += RUN)
        for (int64_t slice = 1; slice < job.slices; slice++)
            for (int64_t i = begin; i < std::min(begin + RUN, size); i += LANES)
                save(job.dx + i, load(job.dx + i) + load(job.dx + slice * size + i));
}

// Logits of the labels in chosen tiles, document by document, summed in the order of fanin_run: x [B][D], tiles [B][count],
// scores [B][count * tile]; -inf beyond the last label.
extern "C" void fanin_pick(const Job* given, const float* x, const int64_t* tiles, int64_t count, float* scores) {
    const Job& job = *given;
    const int64_t n = job.fan_in;
#pragma omp parallel num_threads(job.threads)
    {
        Lines weight;  // of a tile, decoded
        weight.assign(job.tile * n, 0.0f);
        std::vector<int32_t> index(job.tile / job.group * n);
#pragma omp for schedule(dynamic, 1)
        for (int64_t document = 0; document < job.batch; document++)
            for (int64_t t = document * count; t < (document + 1) * count; t++) {
                const float* own = x + document * job.features;
                float* to = scores + t * job.tile;
                const int64_t first = tiles[t] * job.tile, labels = std::min(job.tile, job.labels - first);
                const int64_t units = (labels + job.group - 1) / job.group;
                if (t + 1 < (document + 1) * count) {
                    const int64_t next = tiles[t + 1] * job.tile, some = std::min(job.tile, job.labels - next);
                    fetch(job.weight, job.weight_type, next * n, some * n);
                    fetch(job.index, job.index_type, next / job.group * n, (some + job.group - 1) / job.group * n);
                }
                decode(job.weight, job.weight_type, first * n, labels * n, weight.data());
                indices(job.index, job.index_type, first / job.group * n, units * n, index.data());
                for (int64_t l = 0; l < labels; l++) to[l] = job.bias ? job.bias[first + l] : 0.0f;
                std::fill(to + labels, to + job.tile, -std::numeric_limits<float>::infinity());
                if (job.group == 1) {
                    int64_t l = 0;
                    for (; l + 4 <= labels; l += 4) pick_labels<4, 2>(own, &weight[l * n], &index[l * n], n, n, to + l);
                    for (; l < labels; l++) pick_labels<1, 2>(own, &weight[l * n], &index[l * n], n, n, to + l);
                    continue;
                }
                for (int64_t u = 0; u < units; u++) {
                    const int64_t end = std::min((u + 1) * job.group, labels);
                    int64_t l = u * job.group;
                    for (; l + 8 <= end; l += 8) pick_labels<8, 1>(own, &weight[l * n], &index[u * n], 0, n, to + l);
                    for (; l < end; l++) pick_labels<1, 1>(own, &weight[l * n], &index[u * n], 0, n, to + l);
                }
            }
    }
}
