// The product on compute capability 9.0, whose tensor cores are fully used by `wgmma` alone: four warps multiply
// operands in shared memory, and no fragments pass through registers. Copies, layout, rounding and output are those of
// `product.cu`; so is the floor, with 1.88 GB from the second-level cache for three limbs.
//
// A step's multiplications are begun while those of the step before are under way. A stage is filled again after a
// barrier that all warps reach when they know its multiplications to be done: two steps later. The other stages are
// copies ahead.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Two groups of four warps, beside each other over the same 64 rows: a warp has 16 rows of its group's columns. Stages
// take up to 196 KiB.
template <unsigned LIMBS>
struct HopperTile;
template <>
struct HopperTile<1> : TileOf<1, 16, 128, 4, 2, 8> {};
template <>
struct HopperTile<2> : TileOf<2, 16, 128, 4, 2, 8> {};
template <>
struct HopperTile<3> : TileOf<3, 16, 128, 4, 2, 7> {};
template <>
struct HopperTile<4> : TileOf<4, 16, 96, 4, 2, 7> {};
template <>
struct HopperTile<5> : TileOf<5, 16, 64, 4, 2, 7> {};
template <>
struct HopperTile<6> : TileOf<6, 16, 64, 4, 2, 6> {};

template <unsigned LIMBS>
__device__ __forceinline__ void hopper_product(const unsigned char* rows, unsigned row_count, unsigned pitch,
                                               const signed char* weights, unsigned columns, unsigned char* out,
                                               unsigned output_bits) {
    using T = HopperTile<LIMBS>;
    static_assert(T::ROWS == 64 && T::FRAGMENTS_DOWN == 1, "one instruction has all rows");
    static_assert(T::STAGE_BYTES % 512 == 0, "swizzled lines begin where their pattern does");
    // Copies that are ahead of the multiplications.
    constexpr unsigned AHEAD = T::DEPTH - 2;

    unsigned char* const shared = dynamic_shared();
    const SharedAddress stages = shared_address(shared), end = stages + T::SHARED_BYTES;
    const unsigned thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const Origin origin = origin_of<T>(blockIdx.x, row_count, columns);
    unsigned left = pitch / STEP; // steps

    Fetcher<T> fetcher(rows, row_count, weights, columns, pitch, origin, thread);
#pragma unroll
    for (unsigned stage = 0; stage < AHEAD; ++stage) {
        if (stage < left) {
            fetcher.fetch(stages + stage * T::STAGE_BYTES);
        }
        commit_copies();
    }

    Sums<T> sums = {};
#pragma unroll
    for (unsigned limb = 0; limb < LIMBS; ++limb) {
#pragma unroll
        for (unsigned across = 0; across < T::FRAGMENTS_ACROSS; ++across) {
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                settle(sums[limb][0][across][i]);
            }
        }
    }
    const SharedAddress group_columns = (T::ROW_LINES + thread / 128 * T::WARP_COLUMNS) * STEP;
    SharedAddress reading = stages, writing = stages + AHEAD * T::STAGE_BYTES;
    for (; left > 0; --left) {
        // This step's operands have arrived, and the multiplications of the step before the last are done: theirs is the
        // stage that is filled.
        wait_for_copies<AHEAD - 1>();
        fence_for_wgmma();
        wait_for_wgmma<1>();
        __syncthreads();

        begin_wgmma();
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
            const unsigned long long b = described_lines(reading + group_columns + half * 2 * CHUNK);
#pragma unroll
            for (unsigned limb = 0; limb < LIMBS; ++limb) {
                const unsigned long long a = described_lines(reading + limb * T::ROWS * STEP + half * 2 * CHUNK);
                multiply_add_64(sums[limb][0], a, b);
            }
        }
        commit_wgmma();

        if (left > AHEAD) {
            fetcher.fetch(writing);
        }
        commit_copies();
        reading = reading + T::STAGE_BYTES == end ? stages : reading + T::STAGE_BYTES;
        writing = writing + T::STAGE_BYTES == end ? stages : writing + T::STAGE_BYTES;
    }

    wait_for_wgmma<0>();
#pragma unroll
    for (unsigned limb = 0; limb < LIMBS; ++limb) {
#pragma unroll
        for (unsigned across = 0; across < T::FRAGMENTS_ACROSS; ++across) {
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                settle(sums[limb][0][across][i]);
            }
        }
    }
    wait_for_copies<0>();
    // Output takes the place of what was multiplied.
    __syncthreads();
    stage_output<T>(sums, output_bits, warp, lane, shared);
    __syncthreads();
    write_output<T>(shared, output_limbs_of(output_bits), origin, row_count, columns, out, thread);
}

// Arguments and grid as those of `velum_product_l…`.
#define VELUM_HOPPER_PRODUCT(limbs)                                                                                     \
    extern "C" __global__ void __launch_bounds__(HopperTile<limbs>::THREADS, 1)                                          \
    velum_hopper_product_l##limbs(const unsigned char* rows, unsigned row_count, unsigned pitch,                         \
                                  const signed char* weights, unsigned columns, unsigned char* out,                      \
                                  unsigned output_bits) {                                                                \
        hopper_product<limbs>(rows, row_count, pitch, weights, columns, out, output_bits);                               \
    }
VELUM_HOPPER_PRODUCT(1)
VELUM_HOPPER_PRODUCT(2)
VELUM_HOPPER_PRODUCT(3)
VELUM_HOPPER_PRODUCT(4)
VELUM_HOPPER_PRODUCT(5)
VELUM_HOPPER_PRODUCT(6)

#endif
