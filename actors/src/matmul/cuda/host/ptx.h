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
    auto first = fiber.copies.begin();
    for (; first != fiber.copies.end() && first->group + PENDING < fiber.group; ++first) {
        std::memcpy(first->to, first->from, 16);
        fiber.unfenced = true;
    }
    fiber.copies.erase(fiber.copies.begin(), first);
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
            const auto address = static_cast<SharedAddress>(lanes[matrix * 8 + row]->word);
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

// The sum of 32 products. What it is given was checked; a check for each byte would take most of the tests' time.
__attribute__((no_sanitize("address", "undefined"))) static unsigned dot(const unsigned char* a, const signed char* b) {
    int sum = 0;
    for (unsigned k = 0; k < 32; ++k) {
        sum += a[k] * b[k];
    }
    return static_cast<unsigned>(sum);
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
            const unsigned long long word = i < 4 ? lanes[lane]->word : lanes[lane]->argument;
            b[group][row] = static_cast<signed char>(word >> (8 * (i % 4)));
        }
    }
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const unsigned group = lane >> 2, within = lane % 4;
        int* const sums = static_cast<int*>(lanes[lane]->result);
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = i < 2 ? group : group + 8, column = within * 2 + (i & 1);
            sums[i] = static_cast<int>(static_cast<unsigned>(sums[i]) + dot(a[row], b[column]));
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
            const unsigned long long other = lane ^ lanes[lane]->argument;
            *static_cast<int*>(lanes[lane]->result) = static_cast<int>(lanes[other % WARP]->word);
        }
        return;
    case Collective::GroupMultiplyAdd:
        fail("four warps do this together");
    }
}

} // namespace host

// `wgmma` and what belongs to it. The instruction runs at any time between its beginning and the wait for it: here its
// operands have to be the same at both, and it adds at the wait.

inline unsigned long long described_lines(SharedAddress first) {
    // Start address, leading dimension offset (not used), stride of 8 lines, swizzling mode: each in units of 16 bytes.
    const unsigned long long address = first / 16 % (1u << 14), stride = 512 / 16, mode = 2;
    return address | 1ull << 16 | stride << 32 | mode << 62;
}

inline void fence_for_wgmma() { host::block.fiber().unfenced = false; }
inline void begin_wgmma() {}
inline void settle(int&) {}
inline void commit_wgmma() { ++host::block.fiber().batch; }

template <std::size_t FRAGMENTS>
inline void multiply_add_64(int (&sums)[FRAGMENTS][4], unsigned long long a, unsigned long long b) {
    const unsigned columns = FRAGMENTS * 8;
    host::block.together({host::Collective::GroupMultiplyAdd, a, b, sums, &columns});
}

namespace host {

// 16 bytes, from byte `inner` on, of a line that "Matrix Descriptor Format" describes, in the 64-byte swizzling mode: 8
// lines of 64 bytes, of which chunks of 16 bytes change places by the address's bits 7 and 8; then the next 8 lines.
inline const unsigned char* described_chunk(unsigned long long descriptor, unsigned line, unsigned inner) {
    const unsigned long long start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 2 || (descriptor >> 49 & 7) != 0) {
        fail("a matrix in another swizzling mode, or with an offset");
    }
    const unsigned long long address = start + line / 8 * stride + line % 8 * 64 + inner;
    return shared_chunk(static_cast<SharedAddress>(address ^ (address >> 7 & 3) << 4));
}

// All lines of a matrix, 32 bytes each.
inline std::vector<unsigned char> described_bytes(unsigned long long descriptor, unsigned lines) {
    std::vector<unsigned char> bytes(lines * 32);
    for (unsigned i = 0; i < bytes.size(); i += 16) {
        std::memcpy(&bytes[i], described_chunk(descriptor, i / 32, i % 32), 16);
    }
    return bytes;
}

inline void begin_multiplication(unsigned first) {
    Multiplication multiplication = {};
    for (unsigned i = 0; i < GROUP; ++i) {
        const Fiber& fiber = block.fibers[first + i];
        const Collective& collective = fiber.collective;
        if (i == 0) {
            multiplication = {collective.word, collective.argument, *collective.words, {}, fiber.batch, {}, {}};
        } else if (collective.kind != Collective::GroupMultiplyAdd || collective.word != multiplication.a ||
                   collective.argument != multiplication.b || *collective.words != multiplication.columns ||
                   fiber.batch != multiplication.batch) {
            fail("threads of a group of warps multiply different operands");
        }
        multiplication.sums[i] = static_cast<int*>(collective.result);
    }
    for (const Fiber& fiber : block.fibers) {
        if (fiber.unfenced) {
            fail("a copy has arrived that was not made visible to wgmma");
        }
    }
    multiplication.a_bytes = described_bytes(multiplication.a, 64);
    multiplication.b_bytes = described_bytes(multiplication.b, multiplication.columns);
    block.multiplications[first / GROUP].push_back(multiplication);
}

// "wgmma.mma_async", .m64nNk32, .s32.u8.s8: the fragments of "Matrix Fragments for wgmma.mma_async.m64nNk32".
inline void finish_multiplication(const Multiplication& multiplication) {
    const std::vector<unsigned char>&a = multiplication.a_bytes, &b = multiplication.b_bytes;
    if (a != described_bytes(multiplication.a, 64) || b != described_bytes(multiplication.b, multiplication.columns)) {
        fail("operands change while they are multiplied");
    }
    for (unsigned thread = 0; thread < GROUP; ++thread) {
        const unsigned warp = thread / 32, lane = thread % 32;
        for (unsigned i = 0; i < multiplication.columns / 2; ++i) {
            const unsigned row = warp * 16 + lane / 4 + (i / 2 % 2) * 8;
            const unsigned column = i / 4 * 8 + lane % 4 * 2 + (i & 1);
            int& sum = multiplication.sums[thread][i];
            const unsigned added = dot(&a[row * 32], reinterpret_cast<const signed char*>(&b[column * 32]));
            sum = static_cast<int>(static_cast<unsigned>(sum) + added);
        }
    }
}

} // namespace host

template <unsigned PENDING>
inline void wait_for_wgmma() {
    // Batches end in the order in which they began.
    std::vector<host::Multiplication>& begun = host::block.multiplications[host::block.current / host::GROUP];
    auto first = begun.begin();
    for (; first != begun.end() && first->batch + PENDING < host::block.fiber().batch; ++first) {
        host::finish_multiplication(*first);
    }
    begun.erase(begun.begin(), first);
}
