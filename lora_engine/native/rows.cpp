// Fused passes over rows for CPUs, each of which PyTorch would make in several operations; see kernels.py.
//
// Everything is computed in fp32 whatever the type T of the tensors, and rounded once. Sums are made in an order that
// does not depend on the number of threads, so neither do the bits.

#include "vectors.h"

namespace {

// unit = x / rms(x), result = unit * weight.
template <typename T>
void norm_forward(const float *x, const float *weight, float eps, T *unit, T *result, float *inverse, Index rows,
                  Index width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (Index row = 0; row < rows; row++) {
        const float *from = x + row * width;
        T *own = unit + row * width, *to = result + row * width;
        Vector sums{};
        sweep(width, [&](Index i, Index count) {
            Vector value = load(from + i, count);
            sums += value * value;
        });
        float scale = 1.0f / __builtin_sqrtf(sum_of(sums) / float(width) + eps);
        inverse[row] = scale;
        sweep(width, [&](Index i, Index count) {
            store(own + i, load(from + i, count) * scale, count);
            store(to + i, load(own + i, count) * load(weight + i, count), count);
        });
    }
}

// dx = (dy * weight - unit * mean(dy * weight * unit)) / rms(x) + added.
template <typename T>
void norm_backward(const T *dy, const T *unit, const float *inverse, const float *weight, const float *added,
                   float *dx, Index rows, Index width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (Index row = 0; row < rows; row++) {
        const T *upstream = dy + row * width, *own = unit + row * width;
        const float *more = added ? added + row * width : nullptr;
        float *to = dx + row * width, scale = inverse[row];
        Vector sums{};
        sweep(width, [&](Index i, Index count) {
            sums += load(upstream + i, count) * load(weight + i, count) * load(own + i, count);
        });
        float along = sum_of(sums) / float(width);
        sweep(width, [&](Index i, Index count) {
            Vector value = load(upstream + i, count) * load(weight + i, count) - along * load(own + i, count);
            value *= scale;
            store(to + i, more ? value + load(more + i, count) : value, count);
        });
    }
}

// Rows hold the gate (width) and then the up half.
template <typename T>
void silu_product(const T *gate_up, T *result, Index rows, Index width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (Index row = 0; row < rows; row++) {
        const T *gate = gate_up + 2 * row * width, *up = gate + width;
        T *to = result + row * width;
        sweep(width, [&](Index i, Index count) {
            Vector x = load(gate + i, count);
            store(to + i, x * sigmoid(x) * load(up + i, count), count);
        });
    }
}

template <typename T>
void silu_product_backward(const T *upstream, const T *gate_up, T *gradient, Index rows, Index width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (Index row = 0; row < rows; row++) {
        const T *gate = gate_up + 2 * row * width, *up = gate + width, *from = upstream + row * width;
        T *dgate = gradient + 2 * row * width, *dup = dgate + width;
        sweep(width, [&](Index i, Index count) {
            Vector x = load(gate + i, count), share = sigmoid(x), dy = load(from + i, count);
            store(dup + i, dy * x * share, count);
            store(dgate + i, dy * load(up + i, count) * share * (1.0f + x * (1.0f - share)), count);
        });
    }
}

// cos and sin: rows x pairs; feature i is paired with feature i + pairs. Rows of x lie `apart` elements apart.
template <typename T>
void rotate(T *x, const T *cos, const T *sin, float direction, Index rows, Index apart, Index heads, Index size,
            Index pairs, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (Index row = 0; row < rows; row++) {
        const T *c = cos + row * pairs, *s = sin + row * pairs;
        for (Index head = 0; head < heads; head++) {
            T *first = x + row * apart + head * size, *second = first + pairs;
            sweep(pairs, [&](Index i, Index count) {
                Vector a = load(first + i, count), b = load(second + i, count);
                Vector along = load(c + i, count), turn = direction * load(s + i, count);
                store(first + i, a * along - b * turn, count);
                store(second + i, b * along + a * turn, count);
            });
        }
    }
}

// Negative log-likelihood of each row's target; with `scales` the logits become scale * (softmax - one at the target).
template <typename T>
void softmax_loss(T *logits, const Index *targets, const float *scales, float *losses, Index rows, Index width,
                  int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (Index row = 0; row < rows; row++) {
        T *own = logits + row * width;
        Vector most = Vector{} + float(own[0]);
        sweep(width, [&](Index i, Index count) {
            Vector value = count == LANES ? load(own + i) : Vector{} + float(own[0]);
            for (Index j = 0; count < LANES && j < count; j++) value[j] = own[i + j];
            most = value > most ? value : most;
        });
        float largest = most[0];
        for (int i = 1; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
        double whole = 0;
        // In blocks: one fp32 sum over a vocabulary would lose digits.
        for (Index start = 0; start < width; start += 64 * LANES) {
            Vector sums{};
            sweep(width - start < 64 * LANES ? width - start : 64 * LANES, [&](Index i, Index count) {
                Vector value = exponential(load(own + start + i, count) - largest);
                for (Index j = count; j < LANES; j++) value[j] = 0;
                sums += value;
            });
            whole += sum_of(sums);
        }
        float target = own[targets[row]], total = float(whole);
        losses[row] = __builtin_logf(total) + largest - target;
        if (!scales) continue;
        float scale = scales[row], share = 1.0f / total;
        sweep(width, [&](Index i, Index count) {
            store(own + i, scale * (exponential(load(own + i, count) - largest) * share), count);
        });
        own[targets[row]] = scale * (exponential(target - largest) * share - 1.0f);
    }
}

}  // namespace

#define KERNELS(T, NAME)                                                                                              \
    extern "C" void norm_forward_##NAME(const float *x, const float *weight, float eps, T *unit, T *result,           \
                                        float *inverse, Index rows, Index width, int threads) {                      \
        norm_forward(x, weight, eps, unit, result, inverse, rows, width, threads);                                   \
    }                                                                                                                 \
    extern "C" void norm_backward_##NAME(const T *dy, const T *unit, const float *inverse, const float *weight,       \
                                         const float *added, float *dx, Index rows, Index width, int threads) {      \
        norm_backward(dy, unit, inverse, weight, added, dx, rows, width, threads);                                   \
    }                                                                                                                 \
    extern "C" void silu_product_##NAME(const T *gate_up, T *result, Index rows, Index width, int threads) {          \
        silu_product(gate_up, result, rows, width, threads);                                                         \
    }                                                                                                                 \
    extern "C" void silu_product_backward_##NAME(const T *upstream, const T *gate_up, T *gradient, Index rows,        \
                                                 Index width, int threads) {                                         \
        silu_product_backward(upstream, gate_up, gradient, rows, width, threads);                                    \
    }                                                                                                                 \
    extern "C" void rotate_##NAME(T *x, const T *cos, const T *sin, float direction, Index rows, Index apart,         \
                                  Index heads, Index size, Index pairs, int threads) {                               \
        rotate(x, cos, sin, direction, rows, apart, heads, size, pairs, threads);                                    \
    }                                                                                                                 \
    extern "C" void softmax_loss_##NAME(T *logits, const Index *targets, const float *scales, float *losses,          \
                                        Index rows, Index width, int threads) {                                      \
        softmax_loss(logits, targets, scales, losses, rows, width, threads);                                         \
    }

KERNELS(BFloat16, bf16)
KERNELS(float, fp32)
