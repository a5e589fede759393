// The encoder's steps for a GPU, each in one pass. A warp, 32 threads that run side by side, takes a row:
// its threads read neighbouring numbers, and add up what they found by shuffling it among them.
//
// NUMBER  what arrays hold: __half, float or double
// WIDE    what is computed in: float, or double for double
// K       head width, a multiple of 8

#include <cuda_fp16.h>

__device__ WIDE sum(WIDE x) {
    for (int apart = 16; apart; apart /= 2) x += __shfl_xor_sync(0xffffffff, x, apart);
    return x;
}

__device__ WIDE largest(WIDE x) {
    for (int apart = 16; apart; apart /= 2) x = max(x, __shfl_xor_sync(0xffffffff, x, apart));
    return x;
}

// Which row this warp takes, of a launch with one warp to a row.
__device__ int this_row() { return blockIdx.x * blockDim.y + threadIdx.y; }

// The layer norm of one row.
__device__ void normalise(const NUMBER* x, NUMBER* y, const WIDE* weight, const WIDE* bias, WIDE eps,
                          int length) {
    WIDE mean = 0, variance = 0;
    for (int i = threadIdx.x; i < length; i += 32) mean += WIDE(x[i]);
    mean = sum(mean) / length;
    for (int i = threadIdx.x; i < length; i += 32) variance += (WIDE(x[i]) - mean) * (WIDE(x[i]) - mean);
    WIDE deviation = sqrt(sum(variance) / length + eps);
    for (int i = threadIdx.x; i < length; i += 32)
        y[i] = NUMBER((WIDE(x[i]) - mean) / deviation * weight[i] + bias[i]);
}

extern "C" __global__ void layer_norm(const NUMBER* x, NUMBER* y, const WIDE* weight, const WIDE* bias,
                                      WIDE eps, int rows, int length) {
    if (this_row() >= rows) return;
    size_t start = (size_t)this_row() * length;
    normalise(x + start, y + start, weight, bias, eps, length);
}

// For `minclip.fast_gpu`: x += change + added, all rounded once; then into y the layer norm of x.
extern "C" __global__ void add_and_normalise(NUMBER* x, const NUMBER* change, NUMBER* y, const WIDE* added,
                                             const WIDE* weight, const WIDE* bias, WIDE eps, int rows,
                                             int length) {
    if (this_row() >= rows) return;
    size_t start = (size_t)this_row() * length;
    x += start;
    for (int i = threadIdx.x; i < length; i += 32)
        x[i] = NUMBER(WIDE(x[i]) + WIDE(change[start + i]) + added[i]);
    normalise(x, y + start, weight, bias, eps, length);
}

extern "C" __global__ void softmax(const NUMBER* x, NUMBER* y, int rows, int length) {
    if (this_row() >= rows) return;
    x += (size_t)this_row() * length;
    y += (size_t)this_row() * length;
    WIDE top = -1e30, total = 0;
    for (int i = threadIdx.x; i < length; i += 32) top = max(top, WIDE(x[i]));
    top = largest(top);
    for (int i = threadIdx.x; i < length; i += 32) total += exp(WIDE(x[i]) - top);
    total = sum(total);
    for (int i = threadIdx.x; i < length; i += 32) y[i] = NUMBER(exp(WIDE(x[i]) - top) / total);
}

__device__ WIDE quick_gelu_of(WIDE x) { return x / (1 + exp(WIDE(-1.702) * x)); }

__device__ WIDE gelu_of(WIDE x) { return x * erfc(-x * WIDE(0.70710678118654752)) / 2; }

extern "C" __global__ void quick_gelu(const NUMBER* x, NUMBER* y, int rows, int length) {
    if (this_row() >= rows) return;
    size_t start = (size_t)this_row() * length;
    for (size_t i = start + threadIdx.x; i < start + length; i += 32) y[i] = NUMBER(quick_gelu_of(WIDE(x[i])));
}

extern "C" __global__ void gelu(const NUMBER* x, NUMBER* y, int rows, int length) {
    if (this_row() >= rows) return;
    size_t start = (size_t)this_row() * length;
    for (size_t i = start + threadIdx.x; i < start + length; i += 32) y[i] = NUMBER(gelu_of(WIDE(x[i])));
}

// For `minclip.fast_gpu`: the activation of x + added, in place.
extern "C" __global__ void add_and_quick_gelu(NUMBER* x, const WIDE* added, int rows, int length) {
    if (this_row() >= rows) return;
    x += (size_t)this_row() * length;
    for (int i = threadIdx.x; i < length; i += 32) x[i] = NUMBER(quick_gelu_of(WIDE(x[i]) + added[i]));
}

extern "C" __global__ void add_and_gelu(NUMBER* x, const WIDE* added, int rows, int length) {
    if (this_row() >= rows) return;
    x += (size_t)this_row() * length;
    for (int i = threadIdx.x; i < length; i += 32) x[i] = NUMBER(gelu_of(WIDE(x[i]) + added[i]));
}

// Eight threads hold one head of one node between them, K / 8 neighbouring numbers each.
struct alignas(K * sizeof(NUMBER) % 128 ? sizeof(NUMBER) : 16) Part { NUMBER x[K / 8]; };

// Attention over the tree of `minclip.fast`: node n sees its ancestors and itself, which are the nodes
// path[row[n]][0 .. position[n]]. One warp to a node and head; its four groups of eight threads take
// every fourth ancestor each, and put together what they found at the end. qkv comes without its bias: q
// gets its own here; v's is added to what is found, whose weights have sum 1; k's would raise all scores of
// a node alike, which softmax does not see.
extern "C" __global__ void attend(const NUMBER* qkv, const WIDE* bias, NUMBER* context, const int* path,
                                  const int* row, const int* position, int nodes, int heads, int longest) {
    int n = this_row() / heads, head = this_row() % heads, width = heads * K;
    if (n >= nodes) return;
    int group = threadIdx.x / 8, part = head * K + threadIdx.x % 8 * (K / 8);
    Part without_bias = *(const Part*)(qkv + (size_t)n * 3 * width + part);
    WIDE q[K / 8];
    for (int i = 0; i < K / 8; i++) q[i] = WIDE(without_bias.x[i]) + bias[part + i];
    WIDE top = -1e20, total = 0, found[K / 8] = {};
    for (int first = 0; first <= position[n]; first += 4) {
        int at = min(first + group, position[n]);
        const NUMBER* key = qkv + (size_t)path[(size_t)row[n] * longest + at] * 3 * width + width + part;
        Part k = *(const Part*)key, v = *(const Part*)(key + width);
        WIDE score = 0;
        for (int i = 0; i < K / 8; i++) score += q[i] * WIDE(k.x[i]);
        for (int apart = 4; apart; apart /= 2) score += __shfl_xor_sync(0xffffffff, score, apart);
        score = first + group > position[n] ? WIDE(-1e30) : score / sqrt(WIDE(K));
        WIDE before = top;
        top = max(top, score);
        WIDE weight = exp(score - top), kept = exp(before - top);
        total = total * kept + weight;
        for (int i = 0; i < K / 8; i++) found[i] = found[i] * kept + weight * WIDE(v.x[i]);
    }
    WIDE mine = exp(top - largest(top));
    total *= mine;
    for (int apart = 8; apart <= 16; apart *= 2) total += __shfl_xor_sync(0xffffffff, total, apart);
    Part result;
    for (int i = 0; i < K / 8; i++) {
        found[i] *= mine;
        for (int apart = 8; apart <= 16; apart *= 2)
            found[i] += __shfl_xor_sync(0xffffffff, found[i], apart);
        result.x[i] = NUMBER(found[i] / total + bias[2 * width + part + i]);
    }
    if (group == 0) *(Part*)(context + (size_t)n * width + part) = result;
}
