// Launches kernels for whoever writes to the standard input, until it ends.
//
// A request is the kernel's name, nine numbers (grid, block, bytes of shared memory, seed of the order of turns, count
// of arguments), and the arguments: 0 and the bytes of a buffer, or 1 and those of a value. Numbers are of 8 bytes, and
// texts and bytes come after their number. The answer is the bytes of all buffers, one after the other. Integers are those
// of this machine.

namespace host {

static void read(void* to, std::size_t bytes) {
    if (std::fread(to, 1, bytes, stdin) != bytes) {
        fail("the request ends early");
    }
}

static std::uint64_t read_number() {
    std::uint64_t number;
    read(&number, sizeof number);
    return number;
}

// An argument as it came. Buffers are aligned as those of the device are, and no byte longer than they came.
struct Argument {
    bool buffer;
    std::size_t size;
    unsigned char* bytes;

    static Argument receive() {
        Argument argument = {read_number() == 0, read_number(), nullptr};
        void* memory = nullptr;
        if (posix_memalign(&memory, 256, argument.size) != 0) {
            fail("no memory for %zu bytes", argument.size);
        }
        argument.bytes = static_cast<unsigned char*>(memory);
        read(argument.bytes, argument.size);
        return argument;
    }

    template <class T>
    T as() const {
        if constexpr (std::is_pointer_v<T>) {
            if (!buffer) {
                fail("a buffer is meant");
            }
            return reinterpret_cast<T>(bytes);
        } else {
            if (buffer || size != sizeof(T)) {
                fail("a value of %zu bytes is meant, not of %zu", sizeof(T), size);
            }
            T value;
            std::memcpy(&value, bytes, sizeof value);
            return value;
        }
    }
};

using Arguments = std::vector<Argument>;
using Call = std::function<void(const Arguments&)>;

template <class... Types, std::size_t... Indices>
Call call_of(void (*kernel)(Types...), std::index_sequence<Indices...>) {
    return [kernel](const Arguments& arguments) {
        if (arguments.size() != sizeof...(Types)) {
            fail("%zu arguments are meant", sizeof...(Types));
        }
        kernel(arguments[Indices].as<Types>()...);
    };
}

template <class... Types>
Call call_of(void (*kernel)(Types...)) {
    return call_of(kernel, std::index_sequence_for<Types...>());
}

template <class T>
static void put_tile(unsigned*& out) {
    for (const unsigned number : {T::ROWS, T::COLUMNS, T::THREADS, T::SHARED_BYTES}) {
        *out++ = number;
    }
}

// What the launch geometry has to agree with: for each number of limbs rows, columns, threads and shared memory of a
// tile; the same of compute capability 9.0; then of the other kernels.
static void constants(unsigned* out) {
    if (threadIdx.x != 0) {
        return;
    }
    put_tile<Tile<1>>(out);
    put_tile<Tile<2>>(out);
    put_tile<Tile<3>>(out);
    put_tile<Tile<4>>(out);
    put_tile<Tile<5>>(out);
    put_tile<Tile<6>>(out);
    put_tile<HopperTile<1>>(out);
    put_tile<HopperTile<2>>(out);
    put_tile<HopperTile<3>>(out);
    put_tile<HopperTile<4>>(out);
    put_tile<HopperTile<5>>(out);
    put_tile<HopperTile<6>>(out);
    const unsigned numbers[] = {
        MASK_FEATURES, MASK_ROWS, BIASED_THREADS, FINISHED_COLUMNS, PEAK_THREADS, PEAK_FRAGMENTS,
    };
    std::memcpy(out, numbers, sizeof numbers);
}

#define KERNEL(name) {#name, call_of(name)}
static const std::map<std::string, Call> KERNELS = {
    KERNEL(constants),          KERNEL(velum_expand_masks), KERNEL(velum_bias),       KERNEL(velum_column_sums),
    KERNEL(velum_register_loop), KERNEL(velum_product_l1),  KERNEL(velum_product_l2), KERNEL(velum_product_l3),
    KERNEL(velum_product_l4),   KERNEL(velum_product_l5),   KERNEL(velum_product_l6), KERNEL(velum_finish_l1),
    KERNEL(velum_finish_l2),    KERNEL(velum_finish_l3),    KERNEL(velum_finish_l4),  KERNEL(velum_finish_l5),
    KERNEL(velum_finish_l6),    KERNEL(velum_hopper_product_l1), KERNEL(velum_hopper_product_l2),
    KERNEL(velum_hopper_product_l3), KERNEL(velum_hopper_product_l4), KERNEL(velum_hopper_product_l5),
    KERNEL(velum_hopper_product_l6),
};

static void serve(const std::string& name) {
    const auto kernel = KERNELS.find(name);
    if (kernel == KERNELS.end()) {
        fail("there is no kernel %s", name.c_str());
    }
    unsigned sizes[7];
    for (unsigned& size : sizes) {
        size = static_cast<unsigned>(read_number());
    }
    gridDim = {sizes[0], sizes[1], sizes[2]};
    blockDim = {sizes[3], sizes[4], sizes[5]};
    block.shared_bytes = sizes[6];
    block.random.state = read_number();
    Arguments arguments;
    for (std::uint64_t count = read_number(); count > 0; --count) {
        arguments.push_back(Argument::receive());
    }
    block.kernel = [&] { kernel->second(arguments); };
    const auto blocks = static_cast<std::uint64_t>(gridDim.x) * gridDim.y * gridDim.z;
    for (std::uint64_t i = 0; i < blocks; ++i) {
        blockIdx = {static_cast<unsigned>(i % gridDim.x), static_cast<unsigned>(i / gridDim.x % gridDim.y),
                    static_cast<unsigned>(i / gridDim.x / gridDim.y)};
        void* shared = nullptr;
        if (posix_memalign(&shared, 128, block.shared_bytes) != 0) {
            fail("no shared memory");
        }
        block.shared = static_cast<unsigned char*>(shared);
        std::memset(shared, UNDEFINED, block.shared_bytes);
        block.run();
        std::free(shared);
    }
    for (const Argument& argument : arguments) {
        if (argument.buffer && std::fwrite(argument.bytes, 1, argument.size, stdout) != argument.size) {
            fail("nobody reads the answer");
        }
        std::free(argument.bytes);
    }
    std::fflush(stdout);
}

} // namespace host

int main() {
    std::uint64_t length;
    while (std::fread(&length, sizeof length, 1, stdin) == 1) {
        std::string name(length, ' ');
        host::read(&name[0], length);
        host::serve(name);
    }
}
