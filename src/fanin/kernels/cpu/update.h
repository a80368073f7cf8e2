// The update of weights, momentum and biases in place.
#pragma once
#include <cstdint>

#include "job.h"
#include "storage.h"
#include "vectors.h"

namespace {

// SGD for the rows of some labels, one after the other; `gradient` is overwritten, `old` are the decoded weights.
void update_rows(const Job& job, int64_t label, int64_t rows, const float* __restrict old, float* __restrict gradient) {
    const int64_t n = rows * job.fan_in, at = label * job.fan_in;
    const uint64_t place = uint64_t(job.first + label) * uint64_t(job.fan_in);
    if (job.weight_type == FLOAT32 && job.momentum_type == FLOAT32 && n % LANES == 0) {  // the usual case, in one sweep
        float *w = static_cast<float*>(job.weight) + at, *m = static_cast<float*>(job.momentum) + at;
        for (int64_t i = 0; i < n; i += LANES) {
            vf was = load(old + i), change = load(gradient + i) * job.scale + job.decay * was + job.momentum_factor * load(m + i);
            save(m + i, change);
            save(w + i, was - job.lr * change);
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) gradient[i] = gradient[i] * job.scale + job.decay * old[i];
    if (job.momentum_type == FLOAT32) {
        float* m = static_cast<float*>(job.momentum) + at;
        for (int64_t i = 0; i < n; i++) gradient[i] = m[i] = gradient[i] + job.momentum_factor * m[i];
    } else if (job.momentum_type != NONE) {
        const uint16_t* m = static_cast<const uint16_t*>(job.momentum) + at;
        for (int64_t i = 0; i < n; i++) gradient[i] += job.momentum_factor * bits_to_float(uint32_t(m[i]) << 16);
        encode(job.momentum, job.momentum_type, at, n, gradient, job.momentum_seed, place);
    }
    if (job.compensation) {
        uint16_t* lost = job.compensation + at;
        for (int64_t i = 0; i < n; i++) {
            float change = bits_to_float(uint32_t(lost[i]) << 16) - job.lr * gradient[i], stored;
            if (job.weight_type == BFLOAT16) {
                uint16_t code = to_bfloat16_nearest(old[i] + change);
                static_cast<uint16_t*>(job.weight)[at + i] = code;
                stored = bits_to_float(uint32_t(code) << 16);
            } else {
                uint8_t code = to_float8_nearest(old[i] + change);
                static_cast<uint8_t*>(job.weight)[at + i] = code;
                stored = from_float8(code);
            }
            lost[i] = to_bfloat16_nearest(change - (stored - old[i]));
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) gradient[i] = old[i] - job.lr * gradient[i];
    encode(job.weight, job.weight_type, at, n, gradient, job.weight_seed, place);
}

void update_bias(const Job& job, int64_t label, float gradient) {
    gradient *= job.scale;
    if (job.bias_momentum) gradient = job.bias_momentum[label] = gradient + job.momentum_factor * job.bias_momentum[label];
    job.bias[label] -= job.lr * gradient;
}

}  // namespace
