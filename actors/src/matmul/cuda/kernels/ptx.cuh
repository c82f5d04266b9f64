// Every instruction that C++ has no words for, and nothing else.
//
// The tests run the other files on the processor, with host/ptx.h in this file's place: what stands here is seen only
// by NVRTC and by a GPU. So each function is one instruction, and says which section of the PTX ISA (chapter
// "Instruction Set") describes it and where each operand's elements lie. `lane` is the thread's number in its warp,
// `group = lane / 4`, `within = lane % 4`; the lowest byte of a register is its first element.

// An address in the shared memory of the block, in bytes, as the instructions below take it.
using SharedAddress = unsigned;

// The block's dynamic shared memory, aligned to 128 bytes: tiles rely on 16, the swizzle on 128.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char velum_dynamic_shared[];
    return velum_dynamic_shared;
}

// "Data Movement and Conversion Instructions: cvta": a generic pointer into shared memory as an address in it.
__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
    return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// "Data Movement and Conversion Instructions: cp.async": begins to copy 16 bytes from global to shared memory, past the
// first-level cache (.cg, which exists for 16 bytes only), fetching 128 bytes into the second-level cache. Both
// addresses are multiples of 16. Operands: [destination in .shared, 32 bits], [source in .global, 64 bits], size.
__device__ __forceinline__ void copy_async_16(SharedAddress to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
                 :
                 : "r"(to), "l"(__cvta_generic_to_global(from))
                 : "memory");
}

// "cp.async.commit_group": the copies that this thread began since its last call are one group, which may be empty.
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" : : : "memory");
}

// "cp.async.wait_group": waits until at most PENDING of this thread's latest groups are under way. What has arrived is
// seen by this thread, and by the block after __syncthreads().
template <unsigned PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// "Warp-Level Matrix Load Instruction: ldmatrix": four matrices of 8 rows of 16 bytes, not transposed. Lanes 8i to
// 8i + 7 give the addresses of the rows of matrix i, multiples of 16. Of matrix i each lane gets bytes
// `4·within .. 4·within + 3` of row `group`, in registers[i]. The whole warp calls it together.
__device__ __forceinline__ void load_matrices(unsigned (&registers)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(row)
                 : "memory");
}

// "Warp-Level Matrix Multiply-Accumulate Instructions: mma", "Matrix Fragments for mma.m16n8k32": sums += a · b, `a`
// being 16 × 32 unsigned bytes, `b` 32 × 8 signed bytes, `sums` 16 × 8 integers that wrap (no .satfinite).
//   a: byte i of register r stands in row `group + 8·(r % 2)`, column `4·within + 16·(r / 2) + i`;
//   b: byte i of register r stands in row `4·within + 16·r + i`, column `group`;
//   sums: element r stands in row `group + 8·(r / 2)`, column `2·within + r % 2`.
// The whole warp calls it together.
__device__ __forceinline__ void multiply_add(int (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
