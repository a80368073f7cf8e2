// Logits to their gradients, in place.
#pragma once
#include <cmath>
#include <cstdint>

#include "job.h"
#include "vectors.h"

namespace {

struct Range {
    int64_t begin, end;  // of a label's positives in the list
};

// dL/dz where there is no positive
inline vf negative_gradient(const Job& job, vf z) { return job.loss == BCE ? sigmoid(z) : 2.0f * max(z + 1.0f, vf{}); }

// z in, dL/dz out; columns from `width` on are not documents and get 0. Returns the loss if asked.
template <int NV>
double logit_gradient(const Job& job, float* z, int64_t column, int64_t width, Range positives, bool want_loss) {
    if (positives.begin == positives.end && !want_loss && width == NV * LANES) {  // by far the most
        for (int v = 0; v < NV; v++) save(z + v * LANES, negative_gradient(job, load(z + v * LANES)));
        return 0;
    }
    float g[NV * LANES], values[NV * LANES];
    for (int v = 0; v < NV; v++) {
        vf own = load(z + v * LANES), margin = max(own + 1.0f, vf{});
        save(g + v * LANES, negative_gradient(job, own));
        if (want_loss) save(values + v * LANES, job.loss == BCE ? softplus(own) : margin * margin);
    }
    for (int64_t p = positives.begin; p < positives.end; p++) {
        int64_t place = job.positive_documents[p] - column;
        if (place < 0 || place >= width) continue;
        float below = std::fmax(1.0f - z[place], 0.0f);
        g[place] = job.loss == BCE ? g[place] - 1.0f : -2.0f * below;
        if (want_loss) values[place] = job.loss == BCE ? softplus(splat(-z[place]))[0] : below * below;
    }
    for (int64_t i = width; i < NV * LANES; i++) g[i] = values[i] = 0;
    for (int v = 0; v < NV; v++) save(z + v * LANES, load(g + v * LANES));
    if (!want_loss) return 0;
    vf sum = load(values);
    for (int v = 1; v < NV; v++) sum += load(values + v * LANES);
    return double(total(sum));
}

}  // namespace
