// The dense gradient of one unit, and the features with the most of it, for RigL.
#pragma once
#include <cstdint>

#include "job.h"
#include "scratch.h"
#include "vectors.h"

namespace {

// The gradient of label l as if it read every feature: dense[l][d] += sum_b g[l][b] x[d][b]
template <int NV>
void add_dense_gradient(const Job& job, Scratch& s, const float* x, int64_t l) {
    const int64_t padded = (job.features + LANES - 1) / LANES * LANES;
    vf g[NV];
    for (int v = 0; v < NV; v++) g[v] = load(&s.z[l * PANEL + v * LANES]);
    for (int64_t d = 0; d < job.features; d += LANES) {
        vf sums[LANES] = {};
        const int64_t stop = job.features - d < LANES ? job.features - d : LANES;
        for (int64_t j = 0; j < stop; j++)
            for (int v = 0; v < NV; v++) sums[j] += g[v] * load(x + ((d + j) * NV + v) * LANES);
        float* to = &s.dense[l * padded + d];
        save(to, load(to) + totals(sums));
    }
}

// The `count` features with the largest gradient that the unit does not read, largest first (of equals the lower number);
// -1 where there are no more. A group goes by the sum of squares over its labels.
void choose_candidates(const Job& job, Scratch& s, int64_t members, int32_t* to) {
    const int64_t padded = (job.features + LANES - 1) / LANES * LANES;
    float* size = s.dense.data();  // of the unit, squared
    for (int64_t d = 0; d < padded; d += LANES) {
        vf sum = {};
        for (int64_t l = 0; l < members; l++) sum += load(&s.dense[l * padded + d]) * load(&s.dense[l * padded + d]);
        save(size + d, sum);
    }
    for (int64_t k = 0; k < job.fan_in; k++) size[s.index[k]] = -1;
    int64_t found = 0;
    for (int64_t d = 0; d < job.features; d++) {
        if (size[d] < 0 || (found == job.count && !(size[d] > s.best[found - 1]))) continue;
        int64_t place = found < job.count ? found++ : found - 1;
        for (; place > 0 && s.best[place - 1] < size[d]; place--) s.best[place] = s.best[place - 1], to[place] = to[place - 1];
        s.best[place] = size[d], to[place] = int32_t(d);
    }
    for (; found < job.count; found++) to[found] = -1;
}

}  // namespace
