// What surrounds a library's product of signed bytes: rows are biased from unsigned to signed bytes, and the bias is
// taken back from the sums, where it weighs 128 times the sum of a column's weights.
//
// A sum of biased bytes is exact up to 131,071 inner elements (128 · 128 each).

constexpr unsigned BIASED_THREADS = 256;
// Columns whose values a thread finishes.
constexpr unsigned FINISHED_COLUMNS = 4;

// Turns unsigned bytes into the signed bytes that are 128 less, in place: `vectors` runs of 16 bytes, from a multiple of
// 16 on. Any grid.
extern "C" __global__ void __launch_bounds__(BIASED_THREADS) velum_bias(unsigned char* planes, unsigned long long vectors) {
    const unsigned long long threads = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    const unsigned long long thread = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    uint4* const lines = reinterpret_cast<uint4*>(planes);
    for (unsigned long long i = thread; i < vectors; i += threads) {
        uint4 line = lines[i];
        line.x ^= 0x80808080;
        line.y ^= 0x80808080;
        line.z ^= 0x80808080;
        line.w ^= 0x80808080;
        lines[i] = line;
    }
}

// Sums the weights of each column, `weights` being [columns][pitch] from a multiple of 16 on, `pitch` a multiple of 16.
// A warp takes a column. Grid: blocks of eight columns.
extern "C" __global__ void __launch_bounds__(BIASED_THREADS)
velum_column_sums(const signed char* weights, unsigned pitch, unsigned columns, int* sums) {
    const unsigned column = blockIdx.x * (BIASED_THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (column >= columns) {
        return;
    }
    const int4* const line = reinterpret_cast<const int4*>(weights + static_cast<unsigned long long>(column) * pitch);
    int sum = 0;
    for (unsigned i = lane; i < pitch / 16; i += 32) {
        const int4 four = line[i];
        sum = __dp4a(four.x, 0x01010101, sum);
        sum = __dp4a(four.y, 0x01010101, sum);
        sum = __dp4a(four.z, 0x01010101, sum);
        sum = __dp4a(four.w, 0x01010101, sum);
    }
#pragma unroll
    for (unsigned distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, distance);
    }
    if (lane == 0) {
        sums[column] = sum;
    }
}

// A sum of biased bytes without the bias, in the bits of a value.
template <unsigned LIMBS>
__device__ __forceinline__ Value<LIMBS> unbiased(int product, int column_sum) {
    return widened<LIMBS>(product) + (widened<LIMBS>(column_sum) << 7);
}

template <unsigned LIMBS>
__device__ __forceinline__ void finish(const int* products, const int* column_sums, unsigned row_count, unsigned columns,
                                       unsigned char* out, unsigned output_bits) {
    const Rounding<LIMBS> rounded(output_bits);
    const unsigned output_limbs = output_limbs_of(output_bits);
    const unsigned long long column =
        (static_cast<unsigned long long>(blockIdx.x) * BIASED_THREADS + threadIdx.x) * FINISHED_COLUMNS;
    if (column >= columns) {
        return;
    }
    // Whole fours, at multiples of four.
    const bool whole = columns % FINISHED_COLUMNS == 0;
    const unsigned count = columns - column < FINISHED_COLUMNS ? columns - column : FINISHED_COLUMNS;
    for (unsigned row = blockIdx.y; row < row_count; row += gridDim.y) {
        Value<LIMBS> values[FINISHED_COLUMNS] = {};
#pragma unroll
        for (unsigned limb = 0; limb < LIMBS; ++limb) {
            const unsigned long long first = (static_cast<unsigned long long>(limb) * row_count + row) * columns + column;
            int products_here[FINISHED_COLUMNS] = {};
            if (whole) {
                const int4 four = *reinterpret_cast<const int4*>(products + first);
                products_here[0] = four.x;
                products_here[1] = four.y;
                products_here[2] = four.z;
                products_here[3] = four.w;
            } else {
#pragma unroll
                for (unsigned i = 0; i < FINISHED_COLUMNS; ++i) {
                    if (i < count) {
                        products_here[i] = products[first + i];
                    }
                }
            }
#pragma unroll
            for (unsigned i = 0; i < FINISHED_COLUMNS; ++i) {
                if (i < count) {
                    values[i] += unbiased<LIMBS>(products_here[i], column_sums[column + i]) << (8 * limb);
                }
            }
        }
#pragma unroll
        for (unsigned i = 0; i < FINISHED_COLUMNS; ++i) {
            values[i] = rounded(values[i]);
        }
#pragma unroll
        for (unsigned limb = 0; limb < LIMBS; ++limb) {
            if (limb < output_limbs) {
                unsigned bytes = 0;
#pragma unroll
                for (unsigned i = 0; i < FINISHED_COLUMNS; ++i) {
                    bytes |= (static_cast<unsigned>(values[i] >> (8 * limb)) & 0xff) << (8 * i);
                }
                unsigned char* const to =
                    out + (static_cast<unsigned long long>(limb) * row_count + row) * columns + column;
                if (whole) {
                    *reinterpret_cast<unsigned*>(to) = bytes;
                } else {
                    for (unsigned i = 0; i < count; ++i) {
                        to[i] = static_cast<unsigned char>(bytes >> (8 * i));
                    }
                }
            }
        }
    }
}

// `products`: [limb][row_count][columns] from a multiple of 16 on, sums of biased bytes; `column_sums`: of the same
// columns; `out`: [output limb][row_count][columns] from a multiple of 4 on. Grid: (runs of 1,024 columns) × (any
// number of rows).
#define VELUM_FINISH(limbs)                                                                                             \
    extern "C" __global__ void __launch_bounds__(BIASED_THREADS)                                                         \
    velum_finish_l##limbs(const int* products, const int* column_sums, unsigned row_count, unsigned columns,             \
                          unsigned char* out, unsigned output_bits) {                                                    \
        finish<limbs>(products, column_sums, row_count, columns, out, output_bits);                                      \
    }
VELUM_FINISH(1)
VELUM_FINISH(2)
VELUM_FINISH(3)
VELUM_FINISH(4)
VELUM_FINISH(5)
VELUM_FINISH(6)
