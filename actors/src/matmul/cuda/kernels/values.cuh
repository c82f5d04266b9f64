// Values mod 2^(8·LIMBS) from the sums of their limbs, and the bytes of them that are given away.

// Integers in which a value is put together. They wrap at a multiple of the modulus, and bits above it are never
// written; up to four limbs a sum that wrapped in 32 bits is therefore as good as the true one.
template <unsigned LIMBS>
struct ValueOf {
    using Type = unsigned;
};
template <>
struct ValueOf<5> {
    using Type = unsigned long long;
};
template <>
struct ValueOf<6> {
    using Type = unsigned long long;
};
template <unsigned LIMBS>
using Value = typename ValueOf<LIMBS>::Type;

// A signed sum, in the bits of a value.
template <unsigned LIMBS>
__device__ __forceinline__ Value<LIMBS> widened(int sum) {
    return static_cast<Value<LIMBS>>(static_cast<long long>(sum));
}

// Rounds values to their most significant bytes.
template <unsigned LIMBS>
struct Rounding {
    unsigned dropped; // bits
    Value<LIMBS> half;

    __device__ __forceinline__ explicit Rounding(unsigned output_limbs)
        : dropped(8 * (LIMBS - output_limbs)), half((Value<LIMBS>(1) << dropped) >> 1) {}

    // Output byte `l` is bits `8·l .. 8·l + 7` of this.
    __device__ __forceinline__ Value<LIMBS> operator()(Value<LIMBS> value) const {
        return (value + half) >> dropped;
    }
};
