// The fixed fan-in layer on a CPU, label by label (G = 1) or group by group, all in one pass.
//
// The batch is cut into panels of up to 64 documents. A panel of activations lies feature by feature, [D][64] floats, so a
// feature that a label reads is four cache lines in a row. For each label: logits from K rows, their gradient in registers,
// then its part of dW and dx while the rows are still in the first-level cache, then the update in place.
//
// Labels are cut into slices, a number that depends on the shapes alone; each slice sums into a dx of its own, and these are
// added in order. So the result does not depend on how many threads there are.
//
// Vectors are the compiler's own vector extension, as wide as one register: GCC keeps wider ones in memory, ten times as slow.
// How many sums are made at once follows from the number of registers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
constexpr int LINE = 16, PANEL = 64;  // floats in a cache line, to which panels are filled up; documents in a whole panel
constexpr int SUMS = REGISTERS / 2;   // that are held in registers at once
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

enum Mode : int64_t { STEP = 0, LOGITS = 1, GRADIENTS = 2, MAXIMA = 3, CANDIDATES = 4 };
enum Loss : int64_t { BCE = 0, SQUARED_HINGE = 1 };
enum Type : int64_t { NONE = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT8 = 3, UINT16 = 4, INT32 = 5 };

inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void save(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
// A vector that several products share. For AVX2 GCC would read it from memory for each of them, and take a sixth longer.
inline vf held(vf v) {
#if defined(__AVX__) && !defined(__AVX512F__)
    asm("" : "+x"(v));
#endif
    return v;
}
inline vf splat(float s) { return s - vf{}; }
#if defined(__AVX512F__)  // GCC makes a comparison and a blend of what the others say
inline vf max(vf a, vf b) { return (vf)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b); }
inline vf min(vf a, vf b) { return (vf)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }
#endif
inline float bits_to_float(uint32_t b) { float f; std::memcpy(&f, &b, sizeof f); return f; }
inline uint32_t float_to_bits(float f) { uint32_t b; std::memcpy(&b, &f, sizeof b); return b; }

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
typedef std::make_integer_sequence<int, LANES> Lanes;

// In runs of S lanes, a0 a1 a2 a3 .. and b0 b1 b2 b3 ..: firsts are a0 b0 a2 b2 .., seconds a1 b1 a3 b3 ..
template <int S, int... I>
inline vf firsts(vf a, vf b, std::integer_sequence<int, I...>) { return SHUFFLE(a, b, (I & S ? I - S + LANES : I)...); }
template <int S, int... I>
inline vf seconds(vf a, vf b, std::integer_sequence<int, I...>) { return SHUFFLE(a, b, (I & S ? I + LANES : I + S)...); }
template <int S, int... I>
inline vf exchanged(vf a, std::integer_sequence<int, I...>) { return SHUFFLE(a, a, (I ^ S)...); }

template <int S = LANES / 2>
inline float total(vf v) {
    if constexpr (S == 1) return v[0] + v[1];
    else return total<S / 2>(v + exchanged<S>(v, Lanes()));
}

// Lane j of the result is the sum of a[j]'s lanes.
template <int S = 1>
inline vf totals(const vf* a) {
    if constexpr (S == LANES) {
        return a[0];
    } else {
        vf b[LANES / S / 2];
        for (int i = 0; i < LANES / S / 2; i++)
            b[i] = firsts<S>(a[2 * i], a[2 * i + 1], Lanes()) + seconds<S>(a[2 * i], a[2 * i + 1], Lanes());
        return totals<2 * S>(b);
    }
}

template <int S = 1>
inline void transpose(vf* a) {
    if constexpr (S < LANES) {
        for (int i = 0; i < LANES; i++)
            if (!(i & S)) {
                vf first = firsts<S>(a[i], a[i + S], Lanes());
                a[i + S] = seconds<S>(a[i], a[i + S], Lanes());
                a[i] = first;
            }
        transpose<2 * S>(a);
    }
}

// e^x to about 1e-7, relative; x in [-87, 87].
inline vf exponential(vf x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    x = max(min(x, splat(87.0f)), splat(-87.0f));
    vf shifted = x * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
    vf p = r * 8.36918410e-3f + 4.19177599e-2f;  // of degree 5, through Chebyshev's nodes
    p = p * r + 1.66665047e-1f;
    p = p * r + 4.99988675e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.00000012f;
    vi exponent = ((vi)shifted - (vi)splat(magic)) << 23;
    return (vf)((vi)p + exponent);
}

inline vf reciprocal(vf x) {
#ifdef __AVX2__
#ifdef __AVX512F__
    vf y = (vf)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);
#else
    vf y = (vf)_mm256_rcp_ps((__m256)x);
#endif
    return y + y * (1.0f - x * y);  // Newton: a division takes several times as long
#else
    return 1.0f / x;
#endif
}

#ifdef __AVX2__
// To about 2e-7: e^-z = 2^n 2^(j / SIZE) 2^f with j from a table that fills registers and |f| <= 1 / (2 SIZE), which leaves a
// polynomial of degree 2 (32 powers, in two registers) or 3 (8 powers, in one).
struct Powers {
    static constexpr int SIZE = LANES == 16 ? 32 : 8, SHIFT = LANES == 16 ? 18 : 20;  // 2^23 / SIZE = 2^SHIFT
    alignas(64) int32_t bits[SIZE];  // of 2^(j / SIZE), less what j itself adds to the exponent below
    Powers() {
        for (int j = 0; j < SIZE; j++) bits[j] = int32_t(float_to_bits(float(std::exp2(double(j) / SIZE)))) - (j << SHIFT);
    }
    vi operator[](vi j) const {  // of each j its lowest bits
#ifdef __AVX512F__
        return (vi)_mm512_permutex2var_epi32(_mm512_load_si512(bits), (__m512i)j, _mm512_load_si512(bits + 16));
#else
        return (vi)_mm256_permutevar8x32_epi32(_mm256_load_si256((const __m256i*)bits), (__m256i)j);
#endif
    }
};
const Powers POWERS;

inline vf sigmoid(vf z) {
    const float magic = 1.5f * (1 << Powers::SHIFT), slope = -1.44269504f;  // adding the first rounds to 1 / SIZE
    vf x = min(max(z, splat(-87.0f)), splat(87.0f));
    vf shifted = x * slope + magic;
    vf f = x * slope - (shifted - magic);
    vf power = (vf)(POWERS[(vi)shifted] + ((vi)shifted << Powers::SHIFT));
    vf p = Powers::SIZE == 32 ? f * 2.40226507e-1f + 6.93147181e-1f
                              : (f * 5.55080247e-2f + 2.40254686e-1f) * f + 6.93147181e-1f;
    return reciprocal(1.0f + power * (p * f + 1.0f));
}
#else
inline vf sigmoid(vf z) { return reciprocal(1.0f + exponential(-z)); }
#endif

// log(1 + e^z) = max(z, 0) + 2 artanh(t / (2 + t)) with t = e^-|z|, to about 1e-7, relative
inline vf softplus(vf z) {
    vf t = exponential(z > 0 ? -z : z);
    vf s = t / (2.0f + t), q = s * s;
    vf p = q * (1.0f / 15) + (1.0f / 13);
    p = p * q + (1.0f / 11);
    p = p * q + (1.0f / 9);
    p = p * q + (1.0f / 7);
    p = p * q + (1.0f / 5);
    p = p * q + (1.0f / 3);
    p = p * q + 1.0f;
    return max(z, vf{}) + 2.0f * s * p;
}

// Storage below float32; the random bits are those of fanin.kernels.layer.random_bits -----------------------------------

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

struct Job {
    int64_t mode, threads;
    int64_t labels, features, fan_in, group, batch, first, slices, tile;
    int64_t learnt;          // features, the first ones, that dx is wanted of
    const float* x;          // panels
    float* dx;               // [slices][like x, of the learnt features]; null where not wanted
    const uint8_t* present;  // [features], 0 where STEP may pass by a feature: all zero, and not learnt; null: none (G = 1)
    void* weight;
    int64_t weight_type;
    const void* index;
    int64_t index_type;
    float* bias;
    void* momentum;
    int64_t momentum_type;
    float* bias_momentum;
    uint16_t* compensation;
    const int64_t* positive_labels;
    const int64_t* positive_documents;
    int64_t positives;
    int64_t loss;
    double* losses;  // [slices], null where not wanted
    float* z;        // [L][B] out for LOGITS, dL/dz in for GRADIENTS; [tiles][B] out for MAXIMA
    float* dweight;  // [L][K] for GRADIENTS, null where not wanted
    int32_t* candidates;  // [L / G][count] out for CANDIDATES
    int64_t count;
    float lr, momentum_factor, decay, scale;
    uint32_t weight_seed, momentum_seed;
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define BFLOAT16_UNITS
#endif

// Whether a step multiplies in bfloat16. All else keeps to float32, fanin_pick in the same order.
inline bool in_bfloat16(const Job& job) {
#ifdef BFLOAT16_UNITS
    return job.mode == STEP && job.group > 1 && job.weight_type != FLOAT32;
#else
    return false;
#endif
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

// One panel of one label ---------------------------------------------------------------------------------------------

struct Range {
    int64_t begin, end;  // of a label's positives in the list
};

// work(W, column) for W of the panel's NV vectors at a time, from that column on; for fewer where no W are left.
template <int NV, int W, typename Work>
inline void in_blocks(const Work& work) {
    for (int v = 0; v + W <= NV; v += W) work(std::integral_constant<int, W>(), v * LANES);
    if constexpr (NV % W) work(std::integral_constant<int, NV % W>(), NV / W * W * LANES);
}

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

// For the W vectors from column `at` on; then for a whole panel.
template <int NV, int W>
void single_logits(const float* x, const int32_t* index, const float* weight, int64_t n, float bias, float* z, int at) {
    vf even[W], odd[W];
    for (int v = 0; v < W; v++) even[v] = splat(bias), odd[v] = vf{};
    x += at;
    int64_t k = 0;
    for (; k + 2 <= n; k += 2) {
        const float *one = x + int64_t(index[k]) * (NV * LANES), *two = x + int64_t(index[k + 1]) * (NV * LANES);
        for (int v = 0; v < W; v++) even[v] += weight[k] * load(one + v * LANES);
        for (int v = 0; v < W; v++) odd[v] += weight[k + 1] * load(two + v * LANES);
    }
    if (k < n)
        for (int v = 0; v < W; v++) even[v] += weight[k] * load(x + int64_t(index[k]) * (NV * LANES) + v * LANES);
    for (int v = 0; v < W; v++) save(z + at + v * LANES, even[v] + odd[v]);
}

template <int NV>
void single_logits(const float* x, const int32_t* index, const float* weight, int64_t n, float bias, float* z) {
    in_blocks<NV, 4>([&](auto w, int at) { single_logits<NV, w>(x, index, weight, n, bias, z, at); });
}

template <int NV, bool DX, bool DW>
void single_gradients(
    const float* x, float* dx, int64_t learnt, const int32_t* index, const float* weight, int64_t n, const float* z, float* dw) {
    vf g[NV];
    for (int v = 0; v < NV; v++) g[v] = load(z + v * LANES);
    for (int64_t k = 0; k < n; k += LANES) {
        vf sums[LANES];
        int64_t stop = n - k < LANES ? n - k : LANES;
        auto one = [&](int64_t j) {
            int64_t row = int64_t(index[k + j]) * (NV * LANES);
            if (DW) {
                vf even = g[0] * load(x + row), odd = {};  // two: one sum would wait for its own last addition
                for (int v = 1; v < NV; v += 2) odd += g[v] * load(x + row + v * LANES);
                for (int v = 2; v < NV; v += 2) even += g[v] * load(x + row + v * LANES);
                sums[j] = even + odd;
            }
            if (DX && index[k + j] < learnt) {
                const vf own = splat(weight[k + j]);  // once: dx might lie where it does, for all that a compiler knows
                for (int v = 0; v < NV; v++) {
                    float* to = dx + row + v * LANES;
                    save(to, load(to) + own * g[v]);
                }
            }
        };
        if (stop == LANES) {
#pragma GCC unroll 16
            for (int64_t j = 0; j < LANES; j++) one(j);
            if (DW) save(dw + k, load(dw + k) + totals(sums));
        } else {
            for (int64_t j = 0; j < stop; j++) one(j);
            if (DW)
                for (int64_t j = 0; j < stop; j++) dw[k + j] += total(sums[j]);
        }
    }
}

// One panel of one group: small dense products on the K rows that its labels share ----------------------------------------

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

struct Scratch {
    int64_t stride;  // K rounded up to whole vectors
    Lines weight, dweight, turned, z, dbias, dense, best;
    Lines pairs_k, pairs_l, rows, g_columns, g_labels;  // of two bfloat16 each, for BFLOAT16_UNITS
    std::vector<int32_t> index;
    // a label's entries whose features are present, where some are not
    Lines own_weight, own_dweight;
    std::vector<int32_t> own_index, place;
    int64_t own = 0;

    explicit Scratch(const Job& job) : stride((job.fan_in + LANES - 1) / LANES * LANES) {
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

#ifdef BFLOAT16_UNITS
// What the blocks above take when they multiply pairs of bfloat16. x and g are rounded here; the weights are such numbers already.
// A pair is two features (logits), two documents (dW) or two labels (dx), and lies in a float's place.

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
void paired_logits(const Job& job, Scratch& s, const float* x, int64_t members, const float* bias) {
    const int64_t couples = (job.fan_in + 1) / 2;
    for (int64_t k = 0; k < couples; k++) {
        const float *one = x + int64_t(s.index[2 * k]) * (NV * LANES), *two = x + int64_t(s.index[2 * k + 1]) * (NV * LANES);
        for (int v = 0; v < NV; v++)
            save(&s.rows[k * PANEL + v * LANES], coupled(load(one + v * LANES), load(two + v * LANES)));
    }
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
void paired_weight(Scratch& s, const float* x, int64_t members) {
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
    all_weight_rows<Pairs>(s, s.g_columns.data(), PANEL / 2, members, NV * LANES / 2);
}
#endif

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
        paired_logits<NV>(job, s, x, members, job.bias ? job.bias + label : nullptr);
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
        paired_weight<NV>(s, x, members);
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
        if (in_bfloat16(job)) pair_weights(s, members);
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
