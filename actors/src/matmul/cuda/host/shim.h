// CUDA C++ as far as the kernels use it, for an ordinary C++17 compiler: their very source runs on the processor.
//
// The threads of a block are fibers on one thread of the processor. They take turns where they wait for one another: at
// the block's barrier and at what a warp does together. Whose turn it is, is drawn at random, so that a barrier that is
// missing shows. Whatever a GPU would leave undefined ends the program.

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after the other, so that what a block shares may be static.
#define __shared__ static
// What only compute capability 9.0 has is run as well.
#define __CUDA_ARCH_FEAT_SM90_ALL 1

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct Index {
    unsigned x, y, z;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the fiber that runs.
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr unsigned WARP = 32;
constexpr unsigned GROUP = 4 * WARP;
constexpr std::size_t STACK_BYTES = 256 << 10;
// What is in shared memory before anything was written, and where a copy is under way.
constexpr unsigned char UNDEFINED = 0xa5;

[[noreturn]] inline void fail(const char* format, ...) {
    std::va_list arguments;
    va_start(arguments, format);
    std::fprintf(stderr, "block (%u, %u), thread %u: ", blockIdx.x, blockIdx.y, threadIdx.x);
    std::vfprintf(stderr, format, arguments);
    std::fprintf(stderr, "\n");
    va_end(arguments);
    std::fflush(stderr);
    std::_Exit(1);
}

// A generator for the order of turns (splitmix64).
struct Random {
    std::uint64_t state;

    unsigned below(unsigned count) {
        std::uint64_t word = state += 0x9e3779b97f4a7c15;
        word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9;
        word = (word ^ (word >> 27)) * 0x94d049bb133111eb;
        return static_cast<unsigned>((word ^ (word >> 31)) % count);
    }

    std::vector<unsigned> permutation(unsigned count) {
        std::vector<unsigned> order(count);
        for (unsigned i = 0; i < count; ++i) {
            const unsigned other = below(i + 1);
            order[i] = order[other];
            order[other] = i;
        }
        return order;
    }
};

// An asynchronous copy of 16 bytes that nobody has waited for.
struct Copy {
    unsigned char* to;
    const unsigned char* from;
    unsigned group;
};

enum class State { Ready, AtBarrier, AtCollective, Done };

// What a lane brings to something that its warp, or its group of four warps, does together. Pointers are to the lane's
// own variables.
struct Collective {
    enum Kind { LoadMatrices, MultiplyAdd, ShuffleXor, GroupMultiplyAdd } kind;
    unsigned long long word;
    unsigned long long argument;
    void* result;
    const unsigned* words;
};

// A multiplication of four warps that nobody has waited for, and its operands' bytes when it began.
struct Multiplication {
    unsigned long long a, b;
    unsigned columns;
    int* sums[GROUP];
    unsigned batch;
    std::vector<unsigned char> a_bytes, b_bytes;
};

struct Fiber {
    Context context;
    State state;
    Collective collective;
    std::vector<Copy> copies;
    // Groups of copies and of multiplications that were committed.
    unsigned group;
    unsigned batch;
    // Whether copies have arrived that `wgmma` does not see yet.
    bool unfenced;
};

void perform(Collective* const (&lanes)[WARP]);
void begin_multiplication(unsigned first);

// The block that runs.
struct Block {
    std::vector<Fiber> fibers;
    std::vector<std::unique_ptr<unsigned char[]>> stacks;
    Context scheduler;
    unsigned current;
    // Exactly as many bytes as the launch asks for.
    unsigned char* shared;
    unsigned shared_bytes;
    std::function<void()> kernel;
    Random random;
    // Of each group of four warps.
    std::vector<std::vector<Multiplication>> multiplications;

    Fiber& fiber() { return fibers[current]; }

    // Ends the turn of the fiber that runs.
    void wait(State state) {
        fiber().state = state;
        Context::change(fiber().context, scheduler);
    }

    void together(const Collective& collective) {
        fiber().collective = collective;
        wait(State::AtCollective);
    }

    static void begin();
    void turn(unsigned thread);
    void run();
};

static Block block;

inline void Block::begin() {
    block.kernel();
    if (!block.fiber().copies.empty()) {
        fail("a copy is still under way at the end");
    }
    if (!block.multiplications[block.current / GROUP].empty()) {
        fail("a multiplication is still under way at the end");
    }
    block.wait(State::Done);
}

inline void Block::turn(unsigned thread) {
    current = thread;
    threadIdx = {thread, 0, 0};
    Context::change(scheduler, fibers[thread].context);
}

inline void Block::run() {
    const unsigned count = blockDim.x;
    if (count % WARP != 0 || blockDim.y != 1 || blockDim.z != 1) {
        fail("a block of whole warps, of one dimension, is meant");
    }
    fibers.resize(count);
    multiplications.assign((count + GROUP - 1) / GROUP, {});
    while (stacks.size() < count) {
        stacks.emplace_back(new unsigned char[STACK_BYTES]);
    }
    for (unsigned i = 0; i < count; ++i) {
        Fiber& fiber = fibers[i];
        fiber.state = State::Ready;
        fiber.copies.clear();
        fiber.group = 0;
        fiber.batch = 0;
        fiber.unfenced = false;
        // A fiber ends without leaving its first function, of which a sanitizer may have marked the frame.
        ASAN_UNPOISON_MEMORY_REGION(stacks[i].get(), STACK_BYTES);
        fiber.context.prepare(stacks[i].get(), STACK_BYTES, &Block::begin);
    }
    for (;;) {
        bool moved = false;
        unsigned at_barrier = 0, done = 0;
        for (const unsigned warp : random.permutation(count / WARP)) {
            // A warp runs for a random number of turns, so that warps get ahead of one another.
            for (unsigned turns = 1 + random.below(64); turns > 0; --turns) {
                Collective* lanes[WARP];
                unsigned collective = 0, ready = 0;
                for (unsigned lane = 0; lane < WARP; ++lane) {
                    Fiber& fiber = fibers[warp * WARP + lane];
                    if (fiber.state == State::Ready) {
                        turn(warp * WARP + lane);
                        ++ready;
                    }
                    lanes[lane] = &fiber.collective;
                    collective += fiber.state == State::AtCollective;
                }
                if (collective == WARP && lanes[0]->kind == Collective::GroupMultiplyAdd) {
                    // The last of the four warps begins.
                    const unsigned first = warp * WARP / GROUP * GROUP;
                    bool all = first + GROUP <= count;
                    for (unsigned i = first; all && i < first + GROUP; ++i) {
                        all = fibers[i].state == State::AtCollective;
                    }
                    if (all) {
                        begin_multiplication(first);
                        for (unsigned i = first; i < first + GROUP; ++i) {
                            fibers[i].state = State::Ready;
                        }
                        ready = WARP;
                    }
                } else if (collective == WARP) {
                    perform(lanes);
                    for (unsigned lane = 0; lane < WARP; ++lane) {
                        fibers[warp * WARP + lane].state = State::Ready;
                    }
                    ready = WARP;
                } else if (collective > 0) {
                    fail("%u lanes of warp %u do something together", collective, warp);
                }
                moved |= ready > 0;
                if (ready == 0) {
                    break;
                }
            }
        }
        for (const Fiber& fiber : fibers) {
            at_barrier += fiber.state == State::AtBarrier;
            done += fiber.state == State::Done;
        }
        if (done == count) {
            return;
        }
        if (at_barrier > 0 && done > 0) {
            fail("%u threads wait at a barrier, %u have ended", at_barrier, done);
        }
        if (at_barrier == count) {
            for (Fiber& fiber : fibers) {
                fiber.state = State::Ready;
            }
        } else if (!moved) {
            fail("threads wait for one another in different places");
        }
    }
}

} // namespace host

inline void __syncthreads() { host::block.wait(host::State::AtBarrier); }

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    shift %= 32;
    return shift == 0 ? high : high << shift | low >> (32 - shift);
}

// Selector nibbles 0 to 7; the replication of signs is not used.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; ++i) {
        result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    }
    return result;
}

inline int __dp4a(int a, int b, int sum) {
    unsigned result = static_cast<unsigned>(sum);
    for (unsigned i = 0; i < 4; ++i) {
        result += static_cast<unsigned>(static_cast<signed char>(a >> (8 * i)) * static_cast<signed char>(b >> (8 * i)));
    }
    return static_cast<int>(result);
}

inline int __shfl_xor_sync(unsigned mask, int value, unsigned distance) {
    if (mask != 0xffffffff) {
        host::fail("a shuffle of some lanes");
    }
    int result = 0;
    host::block.together({host::Collective::ShuffleXor, static_cast<unsigned>(value), distance, &result, nullptr});
    return result;
}

inline int atomicAdd(int* sum, int value) {
    const int before = *sum;
    *sum = static_cast<int>(static_cast<unsigned>(before) + static_cast<unsigned>(value));
    return before;
}
