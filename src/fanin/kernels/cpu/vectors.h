// Vectors as wide as one register, and functions of them.
//
// They are the compiler's own vector extension: GCC keeps wider ones in memory, ten times as slow. How many sums are made at
// once follows from the number of registers.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
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
constexpr int SUMS = REGISTERS / 2;  // that are held in registers at once
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

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

// work(W, column) for W of NV vectors at a time, from that column on; for fewer where no W are left.
template <int NV, int W, typename Work>
inline void in_blocks(const Work& work) {
    for (int v = 0; v + W <= NV; v += W) work(std::integral_constant<int, W>(), v * LANES);
    if constexpr (NV % W) work(std::integral_constant<int, NV % W>(), NV / W * W * LANES);
}

}  // namespace
