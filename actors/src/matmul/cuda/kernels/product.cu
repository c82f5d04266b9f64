// The product: rows of bytes times weights, all limbs of a value in one thread's registers, so that the 32-bit sums of
// limbs never reach memory.
//
// 1. Steps of 64 inner elements pass through a pipeline of shared memory, filled by asynchronous copies.
// 2. Warps load fragments of them with ldmatrix, half a step ahead of the multiplications, and multiply on the tensor
//    cores: a fragment of the weights meets every limb of its rows.
// 3. Sums of limbs become values mod 2^(8·LIMBS), are rounded to the bits that are given away, and leave through shared
//    memory in whole rows.
//
// Sums are exact while 255 · 128 · pitch < 2^31 (pitch up to 65,792); up to four limbs they may wrap.
//
// # The floor
//
// `r` rows of `L` limbs times an `i × o` matrix take 2·L·r·i·o int8 operations; `L·r·i + i·o` bytes come from memory and
// `l·r·o` go there, for `l` output limbs. For a body of 2,048 tokens through 2048 → 16384 (gate and up of a Llama of a
// billion parameters), L = 3, l = 2:
//   tensor cores     412 G operations             0.275 ms at 1.5 P a second
//   memory           12.6 + 33.6 + 67.1 MB        0.038 ms at 3 TB a second
//   second-level     (1/COLUMNS + 1/(L·ROWS))     2.15 GB; 7.8 TB a second would be needed for the
//     cache            · L·r·i·o bytes              0.275 ms, 0.36 ms at 6 TB a second
//   shared memory    128 bytes an instruction     of 4,096 multiply-adds, which takes 2 clocks where a multiprocessor
//                                                   does 2,048 a clock: 64 of its 128 bytes a clock
// The tensor cores are the limit where they do 2,048 multiply-adds a clock (compute capability 8.0); on 9.0, where `mma`
// reaches about two thirds of the 4,096 of `wgmma`, the second-level cache is about as near.

// The sums of a thread: [limb][fragment down][fragment across][element of a fragment].
template <class T>
using Sums = int[T::LIMBS][T::FRAGMENTS_DOWN][T::FRAGMENTS_ACROSS][4];

template <class T>
__device__ __forceinline__ void multiply(Sums<T>& sums, const Fragments<T>& fragments) {
#pragma unroll
    for (unsigned across = 0; across < T::FRAGMENTS_ACROSS; ++across) {
        const unsigned* const columns = fragments.columns[across / 2] + across % 2 * 2;
#pragma unroll
        for (unsigned limb = 0; limb < T::LIMBS; ++limb) {
#pragma unroll
            for (unsigned down = 0; down < T::FRAGMENTS_DOWN; ++down) {
                multiply_add(sums[limb][down][across], fragments.rows[limb][down], columns[0], columns[1]);
            }
        }
    }
}

// The bytes of a thread's values, to shared memory: [output limb][row][STAGED_ROW].
template <class T>
__device__ __forceinline__ void stage_output(const Sums<T>& sums, unsigned output_bits, unsigned warp, unsigned lane,
                                             unsigned char* staged) {
    const Rounding<T::LIMBS> rounded(output_bits);
    const unsigned output_limbs = output_limbs_of(output_bits);
    const unsigned first_row = warp % T::DOWN * T::WARP_ROWS + lane / 4;
    const unsigned first_column = warp / T::DOWN * T::WARP_COLUMNS + lane % 4 * 2;
#pragma unroll
    for (unsigned down = 0; down < T::FRAGMENTS_DOWN; ++down) {
#pragma unroll
        for (unsigned across = 0; across < T::FRAGMENTS_ACROSS; ++across) {
#pragma unroll
            for (unsigned half = 0; half < 2; ++half) {
                Value<T::LIMBS> left = 0, right = 0;
#pragma unroll
                for (unsigned limb = 0; limb < T::LIMBS; ++limb) {
                    left += widened<T::LIMBS>(sums[limb][down][across][half * 2]) << (8 * limb);
                    right += widened<T::LIMBS>(sums[limb][down][across][half * 2 + 1]) << (8 * limb);
                }
                left = rounded(left);
                right = rounded(right);
                const unsigned row = first_row + down * 16 + half * 8, column = first_column + across * 8;
#pragma unroll
                for (unsigned limb = 0; limb < T::LIMBS; ++limb) {
                    if (limb < output_limbs) {
                        const unsigned low = static_cast<unsigned>(left >> (8 * limb)) & 0xff;
                        const unsigned high = static_cast<unsigned>(right >> (8 * limb)) & 0xff;
                        unsigned char* const bytes = staged + (limb * T::ROWS + row) * T::STAGED_ROW + column;
                        *reinterpret_cast<unsigned short*>(bytes) = static_cast<unsigned short>(low | high << 8);
                    }
                }
            }
        }
    }
}

// The staged bytes of a tile, to `out`: whole chunks where rows begin at multiples of them, else byte by byte.
template <class T>
__device__ __forceinline__ void write_output(const unsigned char* staged, unsigned output_limbs, Origin origin,
                                             unsigned row_count, unsigned columns, unsigned char* out, unsigned thread) {
    const bool whole = columns % CHUNK == 0 && reinterpret_cast<unsigned long long>(out) % CHUNK == 0;
    const unsigned size = whole ? CHUNK : 1;
    const unsigned row_pieces = T::COLUMNS / size;
    const unsigned pieces = output_limbs * T::ROWS * row_pieces;
    for (unsigned piece = thread; piece < pieces; piece += T::THREADS) {
        const unsigned line = piece / row_pieces, offset = piece % row_pieces * size;
        const unsigned limb = line / T::ROWS, row = origin.row + line % T::ROWS, column = origin.column + offset;
        if (row < row_count && column < columns) {
            const unsigned long long out_row = static_cast<unsigned long long>(limb) * row_count + row;
            const unsigned char* const from = staged + line * T::STAGED_ROW + offset;
            unsigned char* const to = out + out_row * columns + column;
            if (whole) {
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            } else {
                *to = *from;
            }
        }
    }
}

template <unsigned LIMBS>
__device__ __forceinline__ void product(const unsigned char* rows, unsigned row_count, unsigned pitch,
                                        const signed char* weights, unsigned columns, unsigned char* out,
                                        unsigned output_bits) {
    using T = Tile<LIMBS>;
    unsigned char* const shared = dynamic_shared();
    const SharedAddress stages = shared_address(shared), end = stages + T::SHARED_BYTES;
    const unsigned thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const Origin origin = origin_of<T>(blockIdx.x, row_count, columns);
    unsigned left = pitch / STEP; // steps

    Fetcher<T> fetcher(rows, row_count, weights, columns, pitch, origin, thread);
#pragma unroll
    for (unsigned stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < left) {
            fetcher.fetch(stages + stage * T::STAGE_BYTES);
        }
        commit_copies();
    }

    Sums<T> sums = {};
    Fragments<T> first, second;
    const Reader<T> reader(warp, lane);
    SharedAddress reading = stages, writing = stages + (STAGES - 1) * T::STAGE_BYTES;
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    reader.load(first, reading, 0);
    for (; left > 0; --left) {
        // The stage that is filled was read for the last time before the previous step's barrier.
        reader.load(second, reading, 1);
        if (left > STAGES - 1) {
            fetcher.fetch(writing);
        }
        commit_copies();
        multiply<T>(sums, first);

        reading = reading + T::STAGE_BYTES == end ? stages : reading + T::STAGE_BYTES;
        writing = writing + T::STAGE_BYTES == end ? stages : writing + T::STAGE_BYTES;
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        // After the last step this is whatever the stage held, and is not multiplied.
        reader.load(first, reading, 0);
        multiply<T>(sums, second);
    }

    // Output takes the place of what was multiplied, and of what was loaded and is not.
    wait_for_copies<0>();
    __syncthreads();
    stage_output<T>(sums, output_bits, warp, lane, shared);
    __syncthreads();
    write_output<T>(shared, output_limbs_of(output_bits), origin, row_count, columns, out, thread);
}

// `rows`: [limb][row_count][pitch], 1 row or more; `weights`: [columns][pitch], 1 column or more, zeros behind the inner
// dimension; both begin at multiples of 16, and `pitch` is a multiple of 64. `out`: [output limb][row_count][columns],
// `output_bits` from 8 to those of the limbs. Grid: one block a tile.
#define VELUM_PRODUCT(limbs)                                                                                            \
    extern "C" __global__ void __launch_bounds__(Tile<limbs>::THREADS, 1)                                                \
    velum_product_l##limbs(const unsigned char* rows, unsigned row_count, unsigned pitch, const signed char* weights,    \
                           unsigned columns, unsigned char* out, unsigned output_bits) {                                 \
        product<limbs>(rows, row_count, pitch, weights, columns, out, output_bits);                                      \
    }
VELUM_PRODUCT(1)
VELUM_PRODUCT(2)
VELUM_PRODUCT(3)
VELUM_PRODUCT(4)
VELUM_PRODUCT(5)
VELUM_PRODUCT(6)
