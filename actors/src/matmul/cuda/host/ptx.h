// The functions of kernels/ptx.cuh on the processor, written from the PTX ISA's text, not from that file.
//
// Shared addresses are offsets in the block's dynamic shared memory.

using SharedAddress = unsigned;

inline unsigned char* dynamic_shared() { return host::block.shared; }

inline SharedAddress shared_address(const void* pointer) {
    return static_cast<SharedAddress>(static_cast<const unsigned char*>(pointer) - host::block.shared);
}

namespace host {

// 16 bytes of shared memory.
inline unsigned char* shared_chunk(SharedAddress address) {
    if (address % 16 != 0 || address + 16 > block.shared_bytes) {
        fail("%u is no place of 16 bytes in %u bytes of shared memory", address, block.shared_bytes);
    }
    return block.shared + address;
}

} // namespace host

// "cp.async" says nothing of when a copy happens between its beginning and the wait for it. Here the destination is
// undefined from the beginning on, and the bytes arrive at the wait: whoever still reads what was there, or reads too
// early, gets something else.
inline void copy_async_16(SharedAddress to, const void* from) {
    unsigned char* const chunk = host::shared_chunk(to);
    if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
        host::fail("a copy from an address that is no multiple of 16");
    }
    std::memset(chunk, host::UNDEFINED, 16);
    host::Fiber& fiber = host::block.fiber();
    fiber.copies.push_back({chunk, static_cast<const unsigned char*>(from), fiber.group});
}

inline void commit_copies() { ++host::block.fiber().group; }

// "cp.async.wait_group N": all groups but the latest N have arrived.
template <unsigned PENDING>
inline void wait_for_copies() {
    host::Fiber& fiber = host::block.fiber();
    std::vector<host::Copy> pending;
    for (const host::Copy& copy : fiber.copies) {
        if (copy.group + PENDING < fiber.group) {
            std::memcpy(copy.to, copy.from, 16);
        } else {
            pending.push_back(copy);
        }
    }
    fiber.copies = pending;
}

inline void load_matrices(unsigned (&registers)[4], SharedAddress row) {
    host::block.together({host::Collective::LoadMatrices, row, 0, registers, nullptr});
}

inline void multiply_add(int (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    host::block.together({host::Collective::MultiplyAdd, b0, b1, sums, a});
}

namespace host {

// "ldmatrix", .m8n8, .x4, .b16, no .trans: threads 0 to 7 hold the row addresses of the first matrix, 8 to 15 of the
// second, and so on; thread t receives elements 2·(t % 4) and 2·(t % 4) + 1 of row t / 4.
inline void perform_load(Collective* const (&lanes)[WARP]) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        unsigned banks = 0;
        for (unsigned row = 0; row < 8; ++row) {
            const SharedAddress address = lanes[matrix * 8 + row]->word;
            const unsigned char* const bytes = shared_chunk(address);
            banks |= 1u << address / 16 % 8;
            for (unsigned quarter = 0; quarter < 4; ++quarter) {
                unsigned* const registers = static_cast<unsigned*>(lanes[row * 4 + quarter]->result);
                std::memcpy(&registers[matrix], bytes + quarter * 4, 4);
            }
        }
        if (banks != 0xff) {
            fail("the rows of a matrix meet in the same banks");
        }
    }
}

// "mma", .m16n8k32, .row.col, .s32.u8.s8.s32: the fragments of the section "Matrix Fragments for mma.m16n8k32" of 8-bit
// integers, element by element.
inline void perform_multiply(Collective* const (&lanes)[WARP]) {
    unsigned char a[16][32];
    signed char b[8][32]; // column by column
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const unsigned group = lane >> 2, within = lane % 4;
        for (unsigned i = 0; i < 16; ++i) {
            const unsigned row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
            const unsigned column = within * 4 + (i & 3) + (i < 8 ? 0 : 16);
            a[row][column] = static_cast<unsigned char>(lanes[lane]->words[i / 4] >> (8 * (i % 4)));
        }
        for (unsigned i = 0; i < 8; ++i) {
            const unsigned row = within * 4 + (i & 3) + (i < 4 ? 0 : 16);
            const unsigned word = i < 4 ? lanes[lane]->word : lanes[lane]->argument;
            b[group][row] = static_cast<signed char>(word >> (8 * (i % 4)));
        }
    }
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const unsigned group = lane >> 2, within = lane % 4;
        int* const sums = static_cast<int*>(lanes[lane]->result);
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = i < 2 ? group : group + 8, column = within * 2 + (i & 1);
            unsigned sum = static_cast<unsigned>(sums[i]);
            for (unsigned k = 0; k < 32; ++k) {
                sum += static_cast<unsigned>(a[row][k] * b[column][k]);
            }
            sums[i] = static_cast<int>(sum);
        }
    }
}

inline void perform(Collective* const (&lanes)[WARP]) {
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (lanes[lane]->kind != lanes[0]->kind) {
            fail("lanes of a warp do different things together");
        }
    }
    switch (lanes[0]->kind) {
    case Collective::LoadMatrices:
        return perform_load(lanes);
    case Collective::MultiplyAdd:
        return perform_multiply(lanes);
    case Collective::ShuffleXor:
        for (unsigned lane = 0; lane < WARP; ++lane) {
            const unsigned other = lane ^ lanes[lane]->argument;
            *static_cast<int*>(lanes[lane]->result) = static_cast<int>(lanes[other % WARP]->word);
        }
    }
}

} // namespace host
