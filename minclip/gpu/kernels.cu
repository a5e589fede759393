// The encoder's steps for a GPU, each in one pass. A warp, 32 threads that run side by side, takes a row:
// its threads read neighbouring numbers, and add up what they found by shuffling it among them.
//
// NUMBER  what arrays hold: __half, float or double
// WIDE    what is computed in: float, or double for double
// PACK    numbers of a row that a thread reads at once: the more, the better memory is used. It divides the
//         row's length, and arrays begin where so many can be read at once
// K       head width, a multiple of 8

#include <cuda_fp16.h>

// Neighbouring numbers, aligned so that as many as can be, 16 bytes, are read or written at once.
__device__ constexpr int alignment(int bytes) { return (bytes & -bytes) < 16 ? bytes & -bytes : 16; }
template <class T, int count> struct alignas(alignment(count * sizeof(T))) Several { T x[count]; };
typedef Several<NUMBER, PACK> Numbers;
typedef Several<WIDE, PACK> Wides;

__device__ WIDE sum(WIDE x) {
    for (int apart = 16; apart; apart /= 2) x += __shfl_xor_sync(0xffffffff, x, apart);
    return x;
}

template <class T> __device__ T largest(T x) {
    for (int apart = 16; apart; apart /= 2) x = max(x, __shfl_xor_sync(0xffffffff, x, apart));
    return x;
}

// Which row this warp takes, of a launch with one warp to a row.
__device__ int this_row() { return blockIdx.x * blockDim.y + threadIdx.y; }

// Numbers i, i + 1, ... of a row and of what is added to every row, if anything is.
__device__ Wides read(const NUMBER* x, const WIDE* added, int i) {
    Numbers numbers = *(const Numbers*)(x + i);
    Wides wides = {};
    if (added) wides = *(const Wides*)(added + i);
    for (int j = 0; j < PACK; j++) wides.x[j] += WIDE(numbers.x[j]);
    return wides;
}

// Into y the layer norm of each row of x + added.
__device__ void normalise(const NUMBER* x, NUMBER* y, const WIDE* added, const WIDE* weight, const WIDE* bias,
                          WIDE eps, int rows, int length) {
    if (this_row() >= rows) return;
    x += (size_t)this_row() * length;
    y += (size_t)this_row() * length;
    WIDE mean = 0, variance = 0;
    for (int i = threadIdx.x * PACK; i < length; i += 32 * PACK) {
        Wides wides = read(x, added, i);
        for (int j = 0; j < PACK; j++) mean += wides.x[j];
    }
    mean = sum(mean) / length;
    for (int i = threadIdx.x * PACK; i < length; i += 32 * PACK) {
        Wides wides = read(x, added, i);
        for (int j = 0; j < PACK; j++) variance += (wides.x[j] - mean) * (wides.x[j] - mean);
    }
    WIDE deviation = sqrt(sum(variance) / length + eps);
    for (int i = threadIdx.x * PACK; i < length; i += 32 * PACK) {
        Wides wides = read(x, added, i), w = *(const Wides*)(weight + i), b = *(const Wides*)(bias + i);
        Numbers numbers;
        for (int j = 0; j < PACK; j++)
            numbers.x[j] = NUMBER((wides.x[j] - mean) / deviation * w.x[j] + b.x[j]);
        *(Numbers*)(y + i) = numbers;
    }
}

extern "C" __global__ void layer_norm(const NUMBER* x, NUMBER* y, const WIDE* weight, const WIDE* bias,
                                      WIDE eps, int rows, int length) {
    normalise(x, y, nullptr, weight, bias, eps, rows, length);
}

extern "C" __global__ void add_and_normalise(const NUMBER* x, NUMBER* y, const WIDE* added, const WIDE* weight,
                                             const WIDE* bias, WIDE eps, int rows, int length) {
    normalise(x, y, added, weight, bias, eps, rows, length);
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

// Into y a function of each number of x + added.
template <WIDE function(WIDE)>
__device__ void each(const NUMBER* x, NUMBER* y, const WIDE* added, int rows, int length) {
    if (this_row() >= rows) return;
    x += (size_t)this_row() * length;
    y += (size_t)this_row() * length;
    for (int i = threadIdx.x * PACK; i < length; i += 32 * PACK) {
        Wides wides = read(x, added, i);
        Numbers numbers;
        for (int j = 0; j < PACK; j++) numbers.x[j] = NUMBER(function(wides.x[j]));
        *(Numbers*)(y + i) = numbers;
    }
}

extern "C" __global__ void quick_gelu(const NUMBER* x, NUMBER* y, int rows, int length) {
    each<quick_gelu_of>(x, y, nullptr, rows, length);
}

extern "C" __global__ void gelu(const NUMBER* x, NUMBER* y, int rows, int length) {
    each<gelu_of>(x, y, nullptr, rows, length);
}

extern "C" __global__ void add_and_quick_gelu(const NUMBER* x, NUMBER* y, const WIDE* added, int rows,
                                              int length) {
    each<quick_gelu_of>(x, y, added, rows, length);
}

extern "C" __global__ void add_and_gelu(const NUMBER* x, NUMBER* y, const WIDE* added, int rows, int length) {
    each<gelu_of>(x, y, added, rows, length);
}

// Attention over the tree of `minclip.fast`: node n sees its ancestors and itself, which are the nodes
// path[row[n]][0 .. position[n]], nodes being counted from `first_node` on. Eight threads take one head of one
// node, each of them K / 8 neighbouring numbers; what is left of the last warp does the last head once more. qkv
// comes without its bias: q gets its own here; v's is added to what is found, whose weights have sum 1; k's
// would raise all scores of a node alike, which softmax does not see.
extern "C" __global__ void attend(const NUMBER* qkv, const WIDE* bias, NUMBER* context, const int* path,
                                  const int* row, const int* position, int first_node, int nodes, int heads,
                                  int longest) {
    typedef Several<NUMBER, K / 8> Part;
    typedef Several<WIDE, K / 8> WidePart;
    int task = min(this_row() * 4 + int(threadIdx.x) / 8, nodes * heads - 1), n = task / heads;
    int part = task % heads * K + threadIdx.x % 8 * (K / 8), width = heads * K;
    int last = position[n], furthest = largest(last);  // all threads of a warp go on till its last is done
    path += (size_t)row[n] * longest;
    Part without_bias = *(const Part*)(qkv + (size_t)n * 3 * width + part);
    WidePart q = *(const WidePart*)(bias + part), found = {};
    for (int i = 0; i < K / 8; i++) q.x[i] += WIDE(without_bias.x[i]);
    WIDE top = -1e30, total = 0;
    for (int at = 0; at <= furthest; at++) {
        const NUMBER* key = qkv + (size_t)(path[min(at, last)] - first_node) * 3 * width + width + part;
        Part k = *(const Part*)key, v = *(const Part*)(key + width);
        WIDE score = 0;
        for (int i = 0; i < K / 8; i++) score += q.x[i] * WIDE(k.x[i]);
        for (int apart = 4; apart; apart /= 2) score += __shfl_xor_sync(0xffffffff, score, apart);
        score = at > last ? WIDE(-1e30) : score / sqrt(WIDE(K));
        WIDE before = top;
        top = max(top, score);
        WIDE weight = exp(score - top), kept = exp(before - top);
        total = total * kept + weight;
        for (int i = 0; i < K / 8; i++) found.x[i] = found.x[i] * kept + weight * WIDE(v.x[i]);
    }
    WidePart v_bias = *(const WidePart*)(bias + 2 * width + part);
    Part result;
    for (int i = 0; i < K / 8; i++) result.x[i] = NUMBER(found.x[i] / total + v_bias.x[i]);
    *(Part*)(context + (size_t)n * width + part) = result;
}
