// The encoder's steps for a GPU. Each kernel reads and writes memory once.
//
// A warp (32 threads that run together) takes one row. Its threads read neighboring numbers and add up their
// partial sums with shuffles.
//
// Set on the compiler's command line:
//   storage_t   the type of the arrays: __half, float or double
//   compute_t   the type of the arithmetic: float, or double for double
//   PACK        how many numbers of a row a thread reads at once: more is faster. PACK divides the row's
//               length, and arrays are aligned to PACK numbers
//   K           the head width, a multiple of 8

#include <cuda_fp16.h>

// Neighboring numbers, aligned so that up to 16 bytes are read or written at once.
__device__ constexpr int alignment(int bytes) { return (bytes & -bytes) < 16 ? bytes & -bytes : 16; }
template <class T, int count> struct alignas(alignment(count * sizeof(T))) Several { T x[count]; };
typedef Several<storage_t, PACK> StoragePack;
typedef Several<compute_t, PACK> ComputePack;

__device__ compute_t warp_sum(compute_t x) {
    for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
    return x;
}

template <class T> __device__ T warp_max(T x) {
    for (int distance = 16; distance; distance /= 2) x = max(x, __shfl_xor_sync(0xffffffff, x, distance));
    return x;
}

// The row of this warp, in a launch with one warp per row.
__device__ int this_row() { return blockIdx.x * blockDim.y + threadIdx.y; }

// Read numbers i to i + PACK - 1 of a row, plus the same numbers of `bias`, unless `bias` is null.
__device__ ComputePack read(const storage_t* x, const compute_t* bias, int i) {
    StoragePack stored = *(const StoragePack*)(x + i);
    ComputePack sum = {};
    if (bias) sum = *(const ComputePack*)(bias + i);
    for (int j = 0; j < PACK; j++) sum.x[j] += compute_t(stored.x[j]);
    return sum;
}

// Write the layer norm of each row of x + added to y.
__device__ void normalize(const storage_t* x, storage_t* y, const compute_t* added, const compute_t* weight,
                          const compute_t* bias, compute_t eps, int rows, int length) {
    if (this_row() >= rows) return;
    x += (size_t)this_row() * length;
    y += (size_t)this_row() * length;
    compute_t mean = 0, variance = 0;
    for (int i = threadIdx.x * PACK; i < length; i += 32 * PACK) {
        ComputePack row = read(x, added, i);
        for (int j = 0; j < PACK; j++) mean += row.x[j];
    }
    mean = warp_sum(mean) / length;
    for (int i = threadIdx.x * PACK; i < length; i += 32 * PACK) {
        ComputePack row = read(x, added, i);
        for (int j = 0; j < PACK; j++) variance += (row.x[j] - mean) * (row.x[j] - mean);
    }
    compute_t deviation = sqrt(warp_sum(variance) / length + eps);
    for (int i = threadIdx.x * PACK; i < length; i += 32 * PACK) {
        ComputePack row = read(x, added, i);
        ComputePack w = *(const ComputePack*)(weight + i), b = *(const ComputePack*)(bias + i);
        StoragePack result;
        for (int j = 0; j < PACK; j++)
            result.x[j] = storage_t((row.x[j] - mean) / deviation * w.x[j] + b.x[j]);
        *(StoragePack*)(y + i) = result;
    }
}

extern "C" __global__ void layer_norm(const storage_t* x, storage_t* y, const compute_t* weight,
                                      const compute_t* bias, compute_t eps, int rows, int length) {
    normalize(x, y, nullptr, weight, bias, eps, rows, length);
}

extern "C" __global__ void add_and_normalize(const storage_t* x, storage_t* y, const compute_t* added,
                                             const compute_t* weight, const compute_t* bias, compute_t eps,
                                             int rows, int length) {
    normalize(x, y, added, weight, bias, eps, rows, length);
}

extern "C" __global__ void softmax(const storage_t* x, storage_t* y, int rows, int length) {
    if (this_row() >= rows) return;
    x += (size_t)this_row() * length;
    y += (size_t)this_row() * length;
    compute_t top = -1e30, total = 0;
    for (int i = threadIdx.x; i < length; i += 32) top = max(top, compute_t(x[i]));
    top = warp_max(top);
    for (int i = threadIdx.x; i < length; i += 32) total += exp(compute_t(x[i]) - top);
    total = warp_sum(total);
    for (int i = threadIdx.x; i < length; i += 32) y[i] = storage_t(exp(compute_t(x[i]) - top) / total);
}

__device__ compute_t quick_gelu_of(compute_t x) { return x / (1 + exp(compute_t(-1.702) * x)); }

__device__ compute_t gelu_of(compute_t x) { return x * erfc(-x * compute_t(0.70710678118654752)) / 2; }

// Write function(x + bias) of each number to y.
template <compute_t function(compute_t)>
__device__ void each(const storage_t* x, storage_t* y, const compute_t* bias, int rows, int length) {
    if (this_row() >= rows) return;
    x += (size_t)this_row() * length;
    y += (size_t)this_row() * length;
    for (int i = threadIdx.x * PACK; i < length; i += 32 * PACK) {
        ComputePack row = read(x, bias, i);
        StoragePack result;
        for (int j = 0; j < PACK; j++) result.x[j] = storage_t(function(row.x[j]));
        *(StoragePack*)(y + i) = result;
    }
}

extern "C" __global__ void quick_gelu(const storage_t* x, storage_t* y, int rows, int length) {
    each<quick_gelu_of>(x, y, nullptr, rows, length);
}

extern "C" __global__ void gelu(const storage_t* x, storage_t* y, int rows, int length) {
    each<gelu_of>(x, y, nullptr, rows, length);
}

extern "C" __global__ void add_and_quick_gelu(const storage_t* x, storage_t* y, const compute_t* bias,
                                              int rows, int length) {
    each<quick_gelu_of>(x, y, bias, rows, length);
}

extern "C" __global__ void add_and_gelu(const storage_t* x, storage_t* y, const compute_t* bias, int rows,
                                        int length) {
    each<gelu_of>(x, y, bias, rows, length);
}

// Attention over the tree of `minclip.fast`. Node n attends to its ancestors and itself, the nodes
// path[row[n]][0 .. position[n]]. Nodes are counted from `first_node` on.
//
// Eight threads take one head of one node, K / 8 neighboring numbers each. Spare threads of the last warp
// repeat the last head.
//
// qkv comes without its bias. q's bias is added here. v's bias is added to the result, because attention
// weights sum to 1. k's bias is left out: it raises all scores of a node alike, and softmax removes that.
extern "C" __global__ void attend(const storage_t* qkv, const compute_t* bias, storage_t* context,
                                  const int* path, const int* row, const int* position, int first_node,
                                  int nodes, int heads, int longest) {
    typedef Several<storage_t, K / 8> StoragePart;
    typedef Several<compute_t, K / 8> ComputePart;
    int task = min(this_row() * 4 + int(threadIdx.x) / 8, nodes * heads - 1), n = task / heads;
    int part = task % heads * K + threadIdx.x % 8 * (K / 8), width = heads * K;
    int last = position[n], warp_last = warp_max(last);  // no thread leaves before its warp: they all shuffle
    path += (size_t)row[n] * longest;
    StoragePart without_bias = *(const StoragePart*)(qkv + (size_t)n * 3 * width + part);
    ComputePart q = *(const ComputePart*)(bias + part), sum = {};
    for (int i = 0; i < K / 8; i++) q.x[i] += compute_t(without_bias.x[i]);
    compute_t top = -1e30, total = 0;
    for (int at = 0; at <= warp_last; at++) {
        const storage_t* key = qkv + (size_t)(path[min(at, last)] - first_node) * 3 * width + width + part;
        StoragePart k = *(const StoragePart*)key, v = *(const StoragePart*)(key + width);
        compute_t score = 0;
        for (int i = 0; i < K / 8; i++) score += q.x[i] * compute_t(k.x[i]);
        for (int distance = 4; distance; distance /= 2) score += __shfl_xor_sync(0xffffffff, score, distance);
        score = at > last ? compute_t(-1e30) : score / sqrt(compute_t(K));
        compute_t before = top;
        top = max(top, score);
        compute_t weight = exp(score - top), kept = exp(before - top);
        total = total * kept + weight;
        for (int i = 0; i < K / 8; i++) sum.x[i] = sum.x[i] * kept + weight * compute_t(v.x[i]);
    }
    ComputePart v_bias = *(const ComputePart*)(bias + 2 * width + part);
    StoragePart result;
    for (int i = 0; i < K / 8; i++) result.x[i] = storage_t(sum.x[i] / total + v_bias.x[i]);
    *(StoragePart*)(context + (size_t)n * width + part) = result;
}
