// Weights, momentum and indices as they are stored: float32, bfloat16 and float8 (e4m3), two bytes an index or four. The random
// bits of stochastic rounding are those of fanin.kernels.layer.random_bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "job.h"
#include "vectors.h"

namespace {

inline uint32_t random_bits(uint32_t seed, uint64_t place) {
    uint32_t h = (uint32_t(place) * 0x9E3779B1u) ^ (uint32_t(place >> 32) * 0x85EBCA77u) ^ seed;
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return h ^ h >> 16;
}

struct Float8 {
    float values[256];
    Float8() {
        for (uint32_t code = 0; code < 256; code++) {
            uint32_t size = code & 0x7F, sign = (code & 0x80) << 24;
            float low = float(size) * 0x1p-9f;  // subnormal
            uint32_t b = size < 8 ? float_to_bits(low) : (size << 20) + (120u << 23);
            values[code] = size == 0x7F ? std::numeric_limits<float>::quiet_NaN() : bits_to_float(b | sign);
        }
    }
};
const Float8 FLOAT8_VALUES;

inline float from_float8(uint8_t code) { return FLOAT8_VALUES.values[code]; }

// noise: 20 random bits, or 1 << 19 for rounding to nearest (away from zero on a tie)
inline uint8_t to_float8(float value, uint32_t noise) {
    uint32_t b = float_to_bits(value), size = b & 0x7FFFFFFFu;
    int32_t normal = int32_t((size + noise) >> 20) - (120 << 3);
    // bounded, so that the conversion is defined for every value; int32 and no branch, so that the compiler makes vectors of it
    const bool subnormal = size < (121u << 23);
    int32_t units = int32_t(bits_to_float(subnormal ? size : 0) * 512.0f + float(int32_t(noise)) * 0x1p-20f);
    int32_t code = subnormal ? units : normal;
    return uint8_t((code < 0x7E ? code : 0x7E) | (b >> 24 & 0x80));
}

inline uint8_t to_float8_nearest(float value) {
    uint32_t b = float_to_bits(value), size = b & 0x7FFFFFFFu;
    int32_t normal = int32_t((size + 0x7FFFFu + (size >> 20 & 1)) >> 20) - (120 << 3);
    const bool subnormal = size < (121u << 23);
    int32_t units = int32_t(std::nearbyint(bits_to_float(subnormal ? size : 0) * 512.0f));
    int32_t code = subnormal ? units : normal;
    return uint8_t((code < 0x7E ? code : 0x7E) | (b >> 24 & 0x80));
}

inline uint16_t to_bfloat16_nearest(float value) {
    uint32_t b = float_to_bits(value);
    return uint16_t((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}

void decode(const void* stored, int64_t type, int64_t at, int64_t n, float* out) {
    if (type == FLOAT32) {
        std::memcpy(out, static_cast<const float*>(stored) + at, n * sizeof(float));
    } else if (type == BFLOAT16) {
        const uint16_t* from = static_cast<const uint16_t*>(stored) + at;
        for (int64_t i = 0; i < n; i++) out[i] = bits_to_float(uint32_t(from[i]) << 16);
    } else {
        const uint8_t* from = static_cast<const uint8_t*>(stored) + at;
        for (int64_t i = 0; i < n; i++) out[i] = from_float8(from[i]);
    }
}

void encode(void* stored, int64_t type, int64_t at, int64_t n, const float* values, uint32_t seed, uint64_t place) {
    if (type == FLOAT32) {
        std::memcpy(static_cast<float*>(stored) + at, values, n * sizeof(float));
    } else if (type == BFLOAT16) {
        uint16_t* to = static_cast<uint16_t*>(stored) + at;
        for (int64_t i = 0; i < n; i++)
            to[i] = uint16_t((float_to_bits(values[i]) + (random_bits(seed, place + i) & 0xFFFF)) >> 16);
    } else {
        uint8_t* to = static_cast<uint8_t*>(stored) + at;
        for (int64_t i = 0; i < n; i++) to[i] = to_float8(values[i], random_bits(seed, place + i) & 0xFFFFF);
    }
}

// Asks for what is read soon: the processor's own prefetching stops at the end of a page.
inline void fetch(const void* stored, int64_t type, int64_t at, int64_t n) {
    const int64_t bytes = type == NONE ? 0 : type == FLOAT32 || type == INT32 ? 4 : type == FLOAT8 ? 1 : 2;
    const char* from = static_cast<const char*>(stored) + at * bytes;
    for (int64_t i = 0; i < n * bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

void indices(const void* stored, int64_t type, int64_t at, int64_t n, int32_t* out) {
    if (type == UINT16) {
        const uint16_t* from = static_cast<const uint16_t*>(stored) + at;
        for (int64_t i = 0; i < n; i++) out[i] = from[i];
    } else {
        std::memcpy(out, static_cast<const int32_t*>(stored) + at, n * sizeof(int32_t));
    }
}

}  // namespace
