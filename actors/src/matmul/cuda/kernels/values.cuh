// Values mod 2^(8·LIMBS) from the sums of their limbs, and the bits of them that are given away.

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

// Bytes in which an output value has room.
__device__ __forceinline__ unsigned output_limbs_of(unsigned output_bits) {
    return (output_bits + 7) / 8;
}

// Rounds values to their most significant bits, at the upper end of as many bytes as have room for them.
template <unsigned LIMBS>
struct Rounding {
    unsigned below; // bits of the bytes that are dropped
    Value<LIMBS> half, dropped;

    __device__ __forceinline__ explicit Rounding(unsigned output_bits)
        : below(8 * (LIMBS - output_limbs_of(output_bits))),
          half((Value<LIMBS>(1) << (8 * LIMBS - output_bits)) >> 1),
          dropped((Value<LIMBS>(1) << (8 * LIMBS - output_bits)) - 1) {}

    // Output byte `l` is bits `8·l .. 8·l + 7` of this.
    __device__ __forceinline__ Value<LIMBS> operator()(Value<LIMBS> value) const {
        return ((value + half) & ~dropped) >> below;
    }
};
