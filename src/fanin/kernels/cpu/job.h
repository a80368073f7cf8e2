// What a call is about, as the Python side hands it over, and the types that its arrays can have.
#pragma once
#include <cstdint>
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define BFLOAT16_UNITS
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define MATRIX_UNIT
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace {

enum Mode : int64_t { STEP = 0, LOGITS = 1, GRADIENTS = 2, MAXIMA = 3, CANDIDATES = 4 };
enum Loss : int64_t { BCE = 0, SQUARED_HINGE = 1 };
enum Type : int64_t { NONE = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT8 = 3, UINT16 = 4, INT32 = 5 };

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

// Whether a step multiplies in bfloat16. All else keeps to float32, fanin_pick in the same order.
inline bool in_bfloat16(const Job& job) {
#ifdef BFLOAT16_UNITS
    return job.mode == STEP && job.group > 1 && job.weight_type != FLOAT32;
#else
    return false;
#endif
}

// Whether it may do so by the processor's matrix unit: Linux hands out that one's registers on request, to the whole process.
inline bool by_matrix_unit(const Job& job) {
#ifdef MATRIX_UNIT
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return in_bfloat16(job) && granted;
#else
    return false;
#endif
}

}  // namespace
