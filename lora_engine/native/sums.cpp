// Weights of a base model plus the product of an adapter's factors, rounded once; see exporting/sums.py, kernels.py.
//
// A number's terms are added in the order of the ranks, then the weight: no bit depends on how rows are divided.

#include "vectors.h"

namespace {

constexpr Index GROUP = 16;  // rows that share a panel while it lies in the nearest cache

// What rounding has changed. Of fp32 sums nothing is left to be rounded: their own rounding counts (Knuth's two-sum).
template <typename T>
inline Vector lost(Vector, Vector, Vector total, Vector stored) {
    return stored - total;
}
template <>
inline Vector lost<float>(Vector weight, Vector added, Vector total, Vector) {
    Vector taken = total - weight;
    return (weight - (total - taken)) + (added - taken);
}

// Stores the first `count` sums; the squares of what rounding has changed in them.
template <typename T>
inline Vector put(Vector weight, Vector added, T *to, Index count) {
    Vector total = weight + added;
    store(to, total, count);
    Vector off = lost<T>(weight, added, total, load(to, count));
    for (Index i = count; i < LANES; i++) off[i] = 0;
    return off * off;
}

// result = weight + left (rows x rank) * right (rank x width); they may be the same memory where S and T are.
// `right` lies in panels of COLUMNS columns (panels x rank x COLUMNS), the last one padded.
// Returns the sum of squares of what rounding changed.
template <typename S, typename T>
double add_product(const S *weight, const float *left, const float *right, T *result, Index rows, Index width,
                   Index rank) {
    double squares = 0;
    for (Index first = 0; first < rows; first += GROUP)
        for (Index column = 0; column < width; column += COLUMNS) {
            const float *panel = right + column * rank;
            Index last = first + GROUP < rows ? first + GROUP : rows;
            Vector changed[VECTORS]{};
            for (Index row = first; row < last; row += TILE) {
                Index tall = last - row < TILE ? last - row : TILE;
                Vector sums[TILE][VECTORS]{};
                // The last rows of an uneven tile repeat the one before them, and are not stored.
                const float *from[TILE];
                for (int i = 0; i < TILE; i++) from[i] = left + (row + (i < tall ? i : tall - 1)) * rank;
                for (Index k = 0; k < rank; k++) {
                    Vector terms[VECTORS];
                    for (int j = 0; j < VECTORS; j++) terms[j] = load(panel + k * COLUMNS + j * LANES);
                    for (int i = 0; i < TILE; i++)
                        for (int j = 0; j < VECTORS; j++) sums[i][j] += from[i][k] * terms[j];
                }
                for (Index i = 0; i < tall; i++) {
                    const S *before = weight + (row + i) * width + column;
                    T *to = result + (row + i) * width + column;
                    if (width - column >= COLUMNS)
                        for (int j = 0; j < VECTORS; j++)
                            changed[j] += put(load(before + j * LANES), sums[i][j], to + j * LANES, LANES);
                    else
                        for (Index j = 0; j * LANES < width - column; j++) {
                            Index left_over = width - column - j * LANES, count = left_over < LANES ? left_over : LANES;
                            changed[j] += put(load(before + j * LANES, count), sums[i][j], to + j * LANES, count);
                        }
                }
            }
            for (int j = 0; j < VECTORS; j++) squares += sum_of(changed[j]);
        }
    return squares;
}

}  // namespace

// How many columns a panel has.
extern "C" Index panel_columns() { return COLUMNS; }

#define KERNEL(S, T, NAME)                                                                                            \
    extern "C" double add_product_##NAME(const S *weight, const float *left, const float *right, T *result,           \
                                         Index rows, Index width, Index rank) {                                      \
        return add_product(weight, left, right, result, rows, width, rank);                                          \
    }

KERNEL(float, float, fp32_fp32)
KERNEL(float, BFloat16, fp32_bf16)
KERNEL(BFloat16, float, bf16_fp32)
KERNEL(BFloat16, BFloat16, bf16_bf16)
#ifdef HALVES
KERNEL(Float16, Float16, fp16_fp16)
KERNEL(Float16, float, fp16_fp32)
KERNEL(Float16, BFloat16, fp16_bf16)
KERNEL(float, Float16, fp32_fp16)
KERNEL(BFloat16, Float16, bf16_fp16)
#endif
