// Attention of a pack's segments for CPUs, forward and backward, in fp32; see attention.py and kernels.py.
//
// A task is one segment and one key head. Probabilities are computed anew in the backward pass from the logarithm of
// their softmax's denominator (arXiv 2205.14135). The order of sums does not depend on the number of threads.

#include <cstdlib>

#include "vectors.h"

namespace {

// C (m x n) = or += A (m x depth) * B (depth x n), for n a multiple of COLUMNS; A's element (i, k) is a[i * ai + k * ak].
template <bool ADD>
void product(const float *a, Index ai, Index ak, const float *b, Index bk, float *c, Index ci, Index m, Index n,
             Index depth) {
    for (Index column = 0; column < n; column += COLUMNS)
        for (Index row = 0; row < m; row += TILE) {
            Index tall = m - row < TILE ? m - row : TILE;
            Vector sums[TILE][VECTORS];
            // The last rows of an uneven tile repeat the one before them, and are not stored.
            const float *from[TILE];
            for (int i = 0; i < TILE; i++) {
                Index own = row + (i < tall ? i : tall - 1);
                from[i] = a + own * ai;
                for (int j = 0; j < VECTORS; j++)
                    sums[i][j] = ADD ? *(const Vector *)(c + own * ci + column + j * LANES) : Vector{};
            }
            for (Index k = 0; k < depth; k++) {
                Vector right[VECTORS];
                for (int j = 0; j < VECTORS; j++) right[j] = *(const Vector *)(b + k * bk + column + j * LANES);
                for (int i = 0; i < TILE; i++) {
                    float left = from[i][k * ak];
                    for (int j = 0; j < VECTORS; j++) sums[i][j] += left * right[j];
                }
            }
            for (Index i = 0; i < tall; i++)
                for (int j = 0; j < VECTORS; j++) *(Vector *)(c + (row + i) * ci + column + j * LANES) = sums[i][j];
        }
}

template <typename T>
void widen(const T *from, float *to, Index count) {
    sweep(count, [&](Index i, Index own) { store(to + i, load(from + i, own), own); });
}

template <typename T>
void narrow(const float *from, T *to, Index count) {
    sweep(count, [&](Index i, Index own) { store(to + i, load(from + i, own), own); });
}

// One group of `packing.AttentionGroup`: segments of `queries` and `keys` rows each; a query sees the keys whose
// position is at most its own, not negative, and within the window. Padded queries have position -1.
struct Group {
    Index segments, queries, keys;
    const Index *query_rows, *key_rows, *query_positions, *key_positions;
    Index window;
};

struct Heads {
    Index heads, key_heads, size, query_apart, key_apart, value_apart;
    float scaling;
};

constexpr float LARGE = 3e38f;  // its negative marks what a query does not see

// Whether a query sees each of the keys at `positions`.
inline Whole visible(const Group &group, Index query, const int32_t *positions) {
    Whole keys = *(const Near *)positions;
    int32_t oldest = int32_t(query - group.window < -1 ? -1 : query - group.window);
    return (keys >= 0) & (keys <= int32_t(query)) & (keys > oldest);
}

// One head's rows, `padded(size)` apart, and their transpose (size x wide), where asked for.
template <typename T>
void gather(const T *from, Index apart, const Index *rows, Index count, Index size, float *straight, float *across,
            Index wide) {
    for (Index i = 0; i < count; i++) {
        const T *row = from + rows[i] * apart;
        if (straight) widen(row, straight + i * padded(size), size);
        if (across)
            for (Index j = 0; j < size; j++) across[j * wide + i] = row[j];
    }
}

// The positions of a segment's keys in 32 bits, with room after them for whole vectors.
inline void place(const Index *positions, Index count, Index wide, int32_t *places) {
    for (Index i = 0; i < wide; i++) places[i] = i < count ? int32_t(positions[i]) : -2;
}

// Keys from which on no query of rows first ... last - 1 sees any.
inline Index seen_keys(const Group &group, const Index *query_positions, const Index *key_positions, Index first,
                       Index last) {
    Index latest = -1;
    for (Index i = first; i < last; i++) latest = query_positions[i] > latest ? query_positions[i] : latest;
    Index count = group.keys;
    while (count > 0 && (key_positions[count - 1] > latest || key_positions[count - 1] < 0)) count--;
    return count;
}

constexpr Index BLOCK = 32;  // queries whose scores are made at once

template <typename T>
void attend(const T *q, const T *k, const T *v, const Group &group, const Heads &heads, T *result, float *logs,
            int threads) {
    const Index size = heads.size, deep = padded(size), wide = padded(group.keys), each = heads.heads / heads.key_heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *room = (float *)std::calloc(2 * deep * wide + BLOCK * (wide + 2 * deep), sizeof(float));
        int32_t *places = (int32_t *)std::calloc(wide, sizeof(int32_t));
        float *keys = room, *values = keys + deep * wide, *scores = values + deep * wide;
        float *queries = scores + BLOCK * wide, *attended = queries + BLOCK * deep;
#pragma omp for schedule(dynamic)
        for (Index task = 0; task < group.segments * heads.key_heads; task++) {
            Index segment = task / heads.key_heads, key_head = task % heads.key_heads;
            const Index *query_rows = group.query_rows + segment * group.queries;
            const Index *query_positions = group.query_positions + segment * group.queries;
            const Index *key_positions = group.key_positions + segment * group.keys;
            const Index *key_rows = group.key_rows + segment * group.keys;
            place(key_positions, group.keys, wide, places);
            gather(k + key_head * size, heads.key_apart, key_rows, group.keys, size, (float *)nullptr, keys, wide);
            gather(v + key_head * size, heads.value_apart, key_rows, group.keys, size, values, (float *)nullptr, 0);
            for (Index head = key_head * each; head < (key_head + 1) * each; head++)
                for (Index first = 0; first < group.queries; first += BLOCK) {
                    Index count = group.queries - first < BLOCK ? group.queries - first : BLOCK;
                    Index seen = seen_keys(group, query_positions, key_positions, first, first + count);
                    gather(q + head * size, heads.query_apart, query_rows + first, count, size, queries,
                           (float *)nullptr, 0);
                    product<false>(queries, deep, 1, keys, wide, scores, wide, count, padded(seen), size);
                    for (Index i = 0; i < count; i++) {
                        Index position = query_positions[first + i];
                        if (position < 0) continue;
                        float *row = scores + i * wide;
                        Vector most = Vector{} - __builtin_inff(), sums{};
                        sweep(seen, [&](Index j, Index) {
                            Vector value = load(row + j) * heads.scaling;
                            value = visible(group, position, places + j) ? value : Vector{} - LARGE;
                            store(row + j, value);
                            most = value > most ? value : most;
                        });
                        float largest = most[0];
                        for (int j = 1; j < LANES; j++) largest = most[j] > largest ? most[j] : largest;
                        sweep(seen, [&](Index j, Index) {
                            Vector value = load(row + j);
                            value = value == -LARGE ? Vector{} : exponential(value - largest);
                            store(row + j, value);
                            sums += value;
                        });
                        float sum = sum_of(sums);
                        sweep(seen, [&](Index j, Index) { store(row + j, load(row + j) * (1.0f / sum)); });
                        logs[query_rows[first + i] * heads.heads + head] = largest + __builtin_logf(sum);
                    }
                    product<false>(scores, wide, 1, values, deep, attended, deep, count, deep, seen);
                    for (Index i = 0; i < count; i++)
                        if (query_positions[first + i] >= 0)
                            narrow(attended + i * deep,
                                   result + (query_rows[first + i] * heads.heads + head) * size, size);
                }
        }
        std::free(places);
        std::free(room);
    }
}

// dk and dv (key rows x key heads x size, fp32) are added to; dq is written.
template <typename T>
void attend_backward(const T *upstream, const T *q, const T *k, const T *v, const T *result, const float *logs,
                     const Group &group, const Heads &heads, T *dq, float *dk, float *dv, int threads) {
    const Index size = heads.size, deep = padded(size), wide = padded(group.keys), each = heads.heads / heads.key_heads;
    const Index count = group.queries, tasks = group.segments * heads.key_heads;
    float *found = (float *)std::calloc(2 * tasks * group.keys * deep, sizeof(float));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int32_t *places = (int32_t *)std::calloc(wide, sizeof(int32_t));
        float *room = (float *)std::calloc(3 * deep * wide + 2 * count * wide + 3 * count * deep, sizeof(float));
        float *keys = room, *keys_across = keys + deep * wide, *values_across = keys_across + deep * wide;
        float *chances = values_across + deep * wide, *scores = chances + count * wide;
        float *queries = scores + count * wide, *dy = queries + count * deep, *own_dq = dy + count * deep;
#pragma omp for schedule(dynamic)
        for (Index task = 0; task < tasks; task++) {
            Index segment = task / heads.key_heads, key_head = task % heads.key_heads;
            const Index *query_rows = group.query_rows + segment * count;
            const Index *query_positions = group.query_positions + segment * count;
            const Index *key_positions = group.key_positions + segment * group.keys;
            const Index *key_rows = group.key_rows + segment * group.keys;
            place(key_positions, group.keys, wide, places);
            float *own_dk = found + task * group.keys * deep, *own_dv = found + (tasks + task) * group.keys * deep;
            gather(k + key_head * size, heads.key_apart, key_rows, group.keys, size, keys, keys_across, wide);
            gather(v + key_head * size, heads.value_apart, key_rows, group.keys, size, (float *)nullptr,
                   values_across, wide);
            for (Index head = key_head * each; head < (key_head + 1) * each; head++) {
                gather(q + head * size, heads.query_apart, query_rows, count, size, queries, (float *)nullptr, 0);
                gather(upstream + head * size, heads.heads * size, query_rows, count, size, dy, (float *)nullptr, 0);
                for (Index first = 0; first < count; first += BLOCK) {
                    Index last = first + BLOCK < count ? first + BLOCK : count;
                    Index seen = seen_keys(group, query_positions, key_positions, first, last);
                    float *block = chances + first * wide, *slopes = scores + first * wide;
                    product<false>(queries + first * deep, deep, 1, keys_across, wide, block, wide, last - first,
                                   padded(seen), size);
                    product<false>(dy + first * deep, deep, 1, values_across, wide, slopes, wide, last - first,
                                   padded(seen), size);
                    for (Index i = first; i < last; i++) {
                        Index position = query_positions[i];
                        float *chance = chances + i * wide, *slope = scores + i * wide;
                        if (position < 0) {
                            std::memset(chance, 0, wide * sizeof(float));
                            std::memset(slope, 0, wide * sizeof(float));
                            continue;
                        }
                        float log = logs[query_rows[i] * heads.heads + head];
                        const T *attended = result + (query_rows[i] * heads.heads + head) * size;
                        Vector sums{};
                        sweep(size, [&](Index j, Index own) {
                            sums += load(dy + i * deep + j, own) * load(attended + j, own);
                        });
                        float along = sum_of(sums);
                        sweep(seen, [&](Index j, Index) {
                            Vector value = exponential(load(chance + j) * heads.scaling - log);
                            value = visible(group, position, places + j) ? value : Vector{};
                            store(chance + j, value);
                            store(slope + j, value * (load(slope + j) - along) * heads.scaling);
                        });
                        Index done = (seen + LANES - 1) / LANES * LANES;
                        std::memset(chance + done, 0, (wide - done) * sizeof(float));
                        std::memset(slope + done, 0, (wide - done) * sizeof(float));
                    }
                    product<false>(slopes, wide, 1, keys, deep, own_dq + first * deep, deep, last - first, deep,
                                   seen);
                }
                for (Index i = 0; i < count; i++)
                    if (query_positions[i] >= 0)
                        narrow(own_dq + i * deep, dq + (query_rows[i] * heads.heads + head) * size, size);
                for (Index key = 0; key < group.keys; key += BLOCK) {
                    Index tall = group.keys - key < BLOCK ? group.keys - key : BLOCK, from = 0;
                    Index earliest = key_positions[key];
                    for (Index i = key; i < key + tall; i++)
                        earliest = key_positions[i] < earliest ? key_positions[i] : earliest;
                    while (from < count && query_positions[from] < earliest) from++;
                    product<true>(chances + from * wide + key, 1, wide, dy + from * deep, deep, own_dv + key * deep,
                                  deep, tall, deep, count - from);
                    product<true>(scores + from * wide + key, 1, wide, queries + from * deep, deep,
                                  own_dk + key * deep, deep, tall, deep, count - from);
                }
            }
        }
        std::free(places);
        std::free(room);
        // Segments share keys: by features, so that threads never meet and the order is always the same.
        Index features = heads.key_heads * size;
#pragma omp for
        for (Index part = 0; part < 2 * heads.key_heads; part++) {
            Index key_head = part / 2;
            float *to = part % 2 ? dv : dk;
            for (Index segment = 0; segment < group.segments; segment++) {
                Index task = segment * heads.key_heads + key_head + (part % 2 ? tasks : 0);
                for (Index i = 0; i < group.keys; i++) {
                    if (group.key_positions[segment * group.keys + i] < 0) continue;
                    float *own = to + group.key_rows[segment * group.keys + i] * features + key_head * size;
                    const float *more = found + (task * group.keys + i) * deep;
                    sweep(size, [&](Index j, Index count) {
                        store(own + j, load(own + j, count) + load(more + j, count), count);
                    });
                }
            }
        }
    }
    std::free(found);
}

}  // namespace

#define KERNELS(T, NAME)                                                                                              \
    extern "C" void attend_##NAME(const T *q, const T *k, const T *v, const Group *group, const Heads *heads,         \
                                  T *result, float *logs, int threads) {                                             \
        attend(q, k, v, *group, *heads, result, logs, threads);                                                      \
    }                                                                                                                 \
    extern "C" void attend_backward_##NAME(const T *upstream, const T *q, const T *k, const T *v, const T *result,    \
                                           const float *logs, const Group *group, const Heads *heads, T *dq,         \
                                           float *dk, float *dv, int threads) {                                      \
        attend_backward(upstream, q, k, v, result, logs, *group, *heads, dq, dk, dv, threads);                       \
    }

KERNELS(BFloat16, bf16)
KERNELS(float, fp32)
