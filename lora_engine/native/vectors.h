// Vectors of floats that load from and store to the tensors' types, and what is computed with them.

#pragma once

#include <cstdint>
#include <cstring>

// IEEE halves, where the processor converts them.
#if defined(__AVX512F__) || defined(__F16C__)
#define HALVES
#include <immintrin.h>
#endif

namespace {

using Index = int64_t;

// Brain floats: the upper half of an IEEE single, rounded to nearest, ties to even.
struct BFloat16 {
    uint16_t bits;
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    BFloat16() = default;
    BFloat16(float value) {
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
        bits = uint16_t(value == value ? rounded : 0x7fc0);
    }
};

#ifdef __AVX512F__
constexpr int LANES = 16, VECTORS = 4;
#else
constexpr int LANES = 8, VECTORS = 2;
#endif
constexpr int COLUMNS = LANES * VECTORS, TILE = 4;
// GCC's vectors: compilers do not vectorise loops over rounded types by themselves.
typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(LANES * 4)));
typedef int32_t Near __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Half __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

inline Index padded(Index count) { return (count + COLUMNS - 1) / COLUMNS * COLUMNS; }

inline Vector load(const float *from) { return *(const Vector *)from; }
inline Vector load(const BFloat16 *from) {
    return (Vector)(__builtin_convertvector(*(const Half *)from, Bits) << 16);
}
inline void store(float *to, Vector value) { *(Vector *)to = value; }
inline void store(BFloat16 *to, Vector value) {
    Bits wide = (Bits)value;
    Bits rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    *(Half *)to = __builtin_convertvector(value == value ? rounded : Bits{} + 0x7fc0, Half);
}
#ifdef HALVES
struct Float16 {
    uint16_t bits;
    operator float() const { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))); }
    Float16() = default;
    Float16(float value) { bits = uint16_t(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), 0))); }
};
#ifdef __AVX512F__
inline Vector load(const Float16 *from) { return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
inline void store(Float16 *to, Vector value) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)value, 0));
}
#else
inline Vector load(const Float16 *from) { return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
inline void store(Float16 *to, Vector value) { _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)value, 0)); }
#endif
#endif
// The first `count` of a vector; the others are 0.
template <typename T>
inline Vector load(const T *from, Index count) {
    if (count == LANES) return load(from);
    Vector value{};
    for (Index i = 0; i < count; i++) value[i] = from[i];
    return value;
}
template <typename T>
inline void store(T *to, Vector value, Index count) {
    if (count == LANES) return store(to, value);
    for (Index i = 0; i < count; i++) to[i] = value[i];
}
inline float sum_of(Vector value) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += value[i];
    return sum;
}
// body(i, count) for every vector of a row; the last one may be short.
template <typename Body>
inline void sweep(Index width, Body body) {
    Index i = 0;
    for (; i + LANES <= width; i += LANES) body(i, Index(LANES));
    if (i < width) body(i, width - i);
}

// exp by the nearest power of two and a polynomial on what is left (Cephes, expf): 2 units in the last place.
inline Vector exponential(Vector x) {
    x = x < -87.0f ? Vector{} - 87.0f : x;
    x = x > 88.0f ? Vector{} + 88.0f : x;
    Vector shifted = x * 1.44269504088896341f + 12582912.0f;
    Vector whole = shifted - 12582912.0f;
    Vector rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vector sum = 1.3981999507e-3f + rest * 1.9875691500e-4f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    Whole power = ((Whole)shifted - 0x4b400000 + 127) << 23;
    return sum * (Vector)power;
}
inline float exponential(float x) { return exponential(Vector{} + x)[0]; }

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace
