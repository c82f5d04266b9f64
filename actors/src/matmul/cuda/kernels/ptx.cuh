// Every instruction that C++ has no words for, and nothing else.
//
// The tests run the other files on the processor, with host/ptx.h in this file's place: what stands here is seen only
// by NVRTC and by a GPU. So each function is one instruction, and says which section of the PTX ISA (chapter
// "Instruction Set") describes it and where each operand's elements lie. `lane` is the thread's number in its warp,
// `group = lane / 4`, `within = lane % 4`; the lowest byte of a register is its first element.

// An address in the shared memory of the block, in bytes, as the instructions below take it.
using SharedAddress = unsigned;

// The block's dynamic shared memory, aligned to 1,024 bytes: the swizzle relies on 128, that of `wgmma` on 512.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char velum_dynamic_shared[];
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

// From here on: compute capability 9.0 alone, code for `sm_90a`.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// "Asynchronous Warpgroup-Level Matrix Instructions", "Matrix Descriptor Format": lines of 64 bytes that follow one
// another in shared memory, in the 64-byte swizzling mode, K-major. Bits 0 to 13: address / 16; bits 16 to 29: leading
// dimension offset, which K-major swizzled layouts do not use (1); bits 32 to 45: from eight lines to the next eight,
// 512 bytes / 16; bits 49 to 51: base offset, 0 as lines begin at multiples of 512; bits 62 and 63: swizzling mode,
// 2 for 64 bytes. In that mode bits 4 and 5 of an address are exclusively or-ed with bits 7 and 8. The next 32 bytes of
// all lines are described by the address 32 bytes on.
__device__ __forceinline__ unsigned long long described_lines(SharedAddress first) {
    return (first >> 4 & 0x3fff) | 1ull << 16 | 32ull << 32 | 2ull << 62;
}

// "Membar / fence": what this thread wrote to shared memory, asynchronous copies that it waited for included, is seen by
// the asynchronous proxy, through which wgmma reads.
__device__ __forceinline__ void fence_for_wgmma() {
    asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}

// "wgmma.fence": registers that were written before may be given to the instructions that follow.
__device__ __forceinline__ void begin_wgmma() {
    asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}

// "wgmma.commit_group": the multiplications since the last call are one group.
__device__ __forceinline__ void commit_wgmma() {
    asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}

// "wgmma.wait_group": waits until at most PENDING of the latest groups are under way.
template <unsigned PENDING>
__device__ __forceinline__ void wait_for_wgmma() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(PENDING) : "memory");
}

// No instruction: a register that the compiler may not compute with before this point, or after it without it.
__device__ __forceinline__ void settle(int& sum) {
    asm volatile("" : "+r"(sum) : : "memory");
}

// "wgmma.mma_async", "Matrix Fragments for wgmma.mma_async.m64nNk32": s += a · b asynchronously, `a` being 64 × 32
// unsigned bytes, `b` 32 × N signed bytes, both in shared memory (`described_lines`; a line of `b` is a column), s 64 × N
// integers that wrap (no .satfinite). With the warp's number in its group of four: s[j][r] stands in row
// `16·warp + group + 8·(r / 2)`, column `8·j + 2·within + r % 2`. The four warps call it together. `p` is true: what s
// held is added to.
__device__ __forceinline__ void multiply_add_64(int (&s)[8][4], unsigned long long a, unsigned long long b) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, %32, %33, p;\n}"
                 : "+r"(s[0][0]), "+r"(s[0][1]), "+r"(s[0][2]), "+r"(s[0][3]),
                   "+r"(s[1][0]), "+r"(s[1][1]), "+r"(s[1][2]), "+r"(s[1][3]),
                   "+r"(s[2][0]), "+r"(s[2][1]), "+r"(s[2][2]), "+r"(s[2][3]),
                   "+r"(s[3][0]), "+r"(s[3][1]), "+r"(s[3][2]), "+r"(s[3][3]),
                   "+r"(s[4][0]), "+r"(s[4][1]), "+r"(s[4][2]), "+r"(s[4][3]),
                   "+r"(s[5][0]), "+r"(s[5][1]), "+r"(s[5][2]), "+r"(s[5][3]),
                   "+r"(s[6][0]), "+r"(s[6][1]), "+r"(s[6][2]), "+r"(s[6][3]),
                   "+r"(s[7][0]), "+r"(s[7][1]), "+r"(s[7][2]), "+r"(s[7][3])
                 : "l"(a), "l"(b)
                 : "memory");
}
__device__ __forceinline__ void multiply_add_64(int (&s)[12][4], unsigned long long a, unsigned long long b) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n96k32.s32.u8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
                 "}, %48, %49, p;\n}"
                 : "+r"(s[0][0]), "+r"(s[0][1]), "+r"(s[0][2]), "+r"(s[0][3]),
                   "+r"(s[1][0]), "+r"(s[1][1]), "+r"(s[1][2]), "+r"(s[1][3]),
                   "+r"(s[2][0]), "+r"(s[2][1]), "+r"(s[2][2]), "+r"(s[2][3]),
                   "+r"(s[3][0]), "+r"(s[3][1]), "+r"(s[3][2]), "+r"(s[3][3]),
                   "+r"(s[4][0]), "+r"(s[4][1]), "+r"(s[4][2]), "+r"(s[4][3]),
                   "+r"(s[5][0]), "+r"(s[5][1]), "+r"(s[5][2]), "+r"(s[5][3]),
                   "+r"(s[6][0]), "+r"(s[6][1]), "+r"(s[6][2]), "+r"(s[6][3]),
                   "+r"(s[7][0]), "+r"(s[7][1]), "+r"(s[7][2]), "+r"(s[7][3]),
                   "+r"(s[8][0]), "+r"(s[8][1]), "+r"(s[8][2]), "+r"(s[8][3]),
                   "+r"(s[9][0]), "+r"(s[9][1]), "+r"(s[9][2]), "+r"(s[9][3]),
                   "+r"(s[10][0]), "+r"(s[10][1]), "+r"(s[10][2]), "+r"(s[10][3]),
                   "+r"(s[11][0]), "+r"(s[11][1]), "+r"(s[11][2]), "+r"(s[11][3])
                 : "l"(a), "l"(b)
                 : "memory");
}
__device__ __forceinline__ void multiply_add_64(int (&s)[16][4], unsigned long long a, unsigned long long b) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, %64, %65, p;\n}"
                 : "+r"(s[0][0]), "+r"(s[0][1]), "+r"(s[0][2]), "+r"(s[0][3]),
                   "+r"(s[1][0]), "+r"(s[1][1]), "+r"(s[1][2]), "+r"(s[1][3]),
                   "+r"(s[2][0]), "+r"(s[2][1]), "+r"(s[2][2]), "+r"(s[2][3]),
                   "+r"(s[3][0]), "+r"(s[3][1]), "+r"(s[3][2]), "+r"(s[3][3]),
                   "+r"(s[4][0]), "+r"(s[4][1]), "+r"(s[4][2]), "+r"(s[4][3]),
                   "+r"(s[5][0]), "+r"(s[5][1]), "+r"(s[5][2]), "+r"(s[5][3]),
                   "+r"(s[6][0]), "+r"(s[6][1]), "+r"(s[6][2]), "+r"(s[6][3]),
                   "+r"(s[7][0]), "+r"(s[7][1]), "+r"(s[7][2]), "+r"(s[7][3]),
                   "+r"(s[8][0]), "+r"(s[8][1]), "+r"(s[8][2]), "+r"(s[8][3]),
                   "+r"(s[9][0]), "+r"(s[9][1]), "+r"(s[9][2]), "+r"(s[9][3]),
                   "+r"(s[10][0]), "+r"(s[10][1]), "+r"(s[10][2]), "+r"(s[10][3]),
                   "+r"(s[11][0]), "+r"(s[11][1]), "+r"(s[11][2]), "+r"(s[11][3]),
                   "+r"(s[12][0]), "+r"(s[12][1]), "+r"(s[12][2]), "+r"(s[12][3]),
                   "+r"(s[13][0]), "+r"(s[13][1]), "+r"(s[13][2]), "+r"(s[13][3]),
                   "+r"(s[14][0]), "+r"(s[14][1]), "+r"(s[14][2]), "+r"(s[14][3]),
                   "+r"(s[15][0]), "+r"(s[15][1]), "+r"(s[15][2]), "+r"(s[15][3])
                 : "l"(a), "l"(b)
                 : "memory");
}

#endif
