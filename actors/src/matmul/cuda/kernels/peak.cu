// What the tensor cores can do: multiplications on registers alone.

constexpr unsigned PEAK_THREADS = 256;
// Instructions of a warp and pass, each on sums of its own, so that none waits for the one before.
constexpr unsigned PEAK_FRAGMENTS = 16;

// Adds up all sums, of all threads, in `*out`, so that none is left out by the compiler: one integer, zero before.
// Operands are those of `peak_word`, for words the number of a thread's register in its block: six a thread.
__device__ __forceinline__ unsigned peak_word(unsigned number) {
    return (number + 1) * 2654435761u;
}

extern "C" __global__ void __launch_bounds__(PEAK_THREADS) velum_register_loop(int* out, unsigned passes) {
    unsigned a[4], b[2];
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        a[i] = peak_word(threadIdx.x * 6 + i);
    }
    b[0] = peak_word(threadIdx.x * 6 + 4);
    b[1] = peak_word(threadIdx.x * 6 + 5);
    int sums[PEAK_FRAGMENTS][4] = {};
    for (unsigned pass = 0; pass < passes; ++pass) {
#pragma unroll
        for (unsigned fragment = 0; fragment < PEAK_FRAGMENTS; ++fragment) {
            multiply_add(sums[fragment], a, b[0], b[1]);
        }
    }
    unsigned sum = 0;
#pragma unroll
    for (unsigned fragment = 0; fragment < PEAK_FRAGMENTS; ++fragment) {
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            sum += static_cast<unsigned>(sums[fragment][i]);
        }
    }
    atomicAdd(out, static_cast<int>(sum));
}
