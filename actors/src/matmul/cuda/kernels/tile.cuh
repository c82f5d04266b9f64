// Tiles of the product: which warp of a block of threads computes what, and where operands lie in shared memory.

// Weights a stage holds of each column, and bytes of each row: a line.
constexpr unsigned STEP = 64;
// Bytes that an instruction copies or a lane of ldmatrix names.
constexpr unsigned CHUNK = 16;
constexpr unsigned LINE_CHUNKS = STEP / CHUNK;
// Stages of the pipeline, where not more is said: while one is multiplied, three are under way. The largest tile takes
// 96 KiB for them.
constexpr unsigned STAGES = 4;
// Row tiles that run beside each other over the same columns: what a wave of blocks reads stays in the second-level
// cache.
constexpr unsigned RASTER_ROWS = 8;

// A block of threads computes ROWS × COLUMNS values, of all limbs; each of its DOWN × ACROSS warps WARP_ROWS ×
// WARP_COLUMNS of them. A thread keeps LIMBS · WARP_ROWS · WARP_COLUMNS / 32 sums in registers.
template <unsigned LIMBS_, unsigned WARP_ROWS_, unsigned WARP_COLUMNS_, unsigned DOWN_, unsigned ACROSS_,
          unsigned STAGES_ = STAGES>
struct TileOf {
    static constexpr unsigned LIMBS = LIMBS_;
    static constexpr unsigned WARP_ROWS = WARP_ROWS_;
    static constexpr unsigned WARP_COLUMNS = WARP_COLUMNS_;
    static constexpr unsigned DOWN = DOWN_;
    static constexpr unsigned ROWS = WARP_ROWS * DOWN;
    static constexpr unsigned COLUMNS = WARP_COLUMNS * ACROSS_;
    static constexpr unsigned THREADS = 32 * DOWN * ACROSS_;
    // 16 × 8 sums of an instruction.
    static constexpr unsigned FRAGMENTS_DOWN = WARP_ROWS / 16;
    static constexpr unsigned FRAGMENTS_ACROSS = WARP_COLUMNS / 8;
    // Lines of a stage: the rows of the first limb, of the second, …, then the columns.
    static constexpr unsigned ROW_LINES = LIMBS * ROWS;
    static constexpr unsigned STAGE_BYTES = (ROW_LINES + COLUMNS) * STEP;
    static constexpr unsigned DEPTH = STAGES_;
    static constexpr unsigned SHARED_BYTES = DEPTH * STAGE_BYTES;
    // A row of output bytes in shared memory: 16 bytes more than are written, so that eight rows meet all banks.
    static constexpr unsigned STAGED_ROW = COLUMNS + CHUNK;

    static_assert(WARP_ROWS % 16 == 0 && WARP_COLUMNS % 16 == 0, "fragments are loaded 16 lines at a time");
    static_assert(THREADS % (8 * LINE_CHUNKS) == 0, "a thread's lines are swizzled alike");
    static_assert(ROW_LINES * STAGED_ROW <= SHARED_BYTES, "output bytes are staged where operands were");
};

// The same work for a warp means the less to load the nearer its lines and its columns are to a square, and the same
// holds for what a block fetches from the second-level cache. Sums take 80 to 144 registers of a
// thread, which with two sets of fragments fit the 255 that it can have.
template <unsigned LIMBS>
struct Tile;
template <>
struct Tile<1> : TileOf<1, 64, 64, 4, 2> {};
template <>
struct Tile<2> : TileOf<2, 32, 64, 4, 2> {};
template <>
struct Tile<3> : TileOf<3, 16, 96, 4, 2> {};
template <>
struct Tile<4> : TileOf<4, 16, 64, 4, 2> {};
template <>
struct Tile<5> : TileOf<5, 16, 32, 2, 4> {};
template <>
struct Tile<6> : TileOf<6, 16, 32, 2, 4> {};

// Where a chunk of a line lies in a stage. Two lines of 64 bytes share the 128 bytes of all banks; chunks change places
// from pair to pair of lines, so that the same chunk of eight lines that follow one another meets all banks once.
__device__ __forceinline__ unsigned swizzled(unsigned line, unsigned chunk) {
    return line * STEP + (chunk ^ (line / 2 % LINE_CHUNKS)) * CHUNK;
}

// First row and column of a block's tile.
struct Origin {
    unsigned row;
    unsigned column;
};

// Tiles in bands of RASTER_ROWS row tiles; in a band, column tile by column tile.
template <class T>
__device__ __forceinline__ Origin origin_of(unsigned block, unsigned row_count, unsigned columns) {
    const unsigned down = (row_count + T::ROWS - 1) / T::ROWS, across = (columns + T::COLUMNS - 1) / T::COLUMNS;
    const unsigned band = block / (RASTER_ROWS * across), rest = block % (RASTER_ROWS * across);
    const unsigned first = band * RASTER_ROWS;
    const unsigned height = down - first < RASTER_ROWS ? down - first : RASTER_ROWS;
    return {(first + rest % height) * T::ROWS, rest / height * T::COLUMNS};
}

// Copies the operands of a tile into the pipeline, step by step. Each thread copies the same chunk of every
// (THREADS / 4)th line.
template <class T>
struct Fetcher {
    static constexpr unsigned PASS = T::THREADS / LINE_CHUNKS;
    static constexpr unsigned ROW_PASSES = (T::ROW_LINES + PASS - 1) / PASS;
    static constexpr unsigned COLUMN_PASSES = (T::COLUMNS + PASS - 1) / PASS;

    const unsigned char* planes;
    const signed char* weights;
    // Where a pass's next chunk lies behind these, in chunks: 64 GiB of operands in half of a pointer's registers.
    unsigned rows[ROW_PASSES];
    unsigned columns[COLUMN_PASSES];
    unsigned line;
    unsigned place;

    // Lines beyond the last row or column repeat it: what comes of them is not written.
    __device__ __forceinline__ Fetcher(const unsigned char* planes_, unsigned row_count, const signed char* weights_,
                                       unsigned column_count, unsigned pitch, Origin origin, unsigned thread)
        : planes(planes_), weights(weights_), line(thread / LINE_CHUNKS),
          place(swizzled(thread / LINE_CHUNKS, thread % LINE_CHUNKS)) {
        const unsigned chunk = thread % LINE_CHUNKS, pitch_chunks = pitch / CHUNK;
#pragma unroll
        for (unsigned pass = 0; pass < ROW_PASSES; ++pass) {
            const unsigned limb = (line + pass * PASS) / T::ROWS;
            const unsigned row = origin.row + (line + pass * PASS) % T::ROWS;
            // The last pass may name lines of no limb, which are not fetched.
            rows[pass] = (limb * row_count + (row < row_count ? row : row_count - 1)) * pitch_chunks + chunk;
        }
#pragma unroll
        for (unsigned pass = 0; pass < COLUMN_PASSES; ++pass) {
            const unsigned column = origin.column + line + pass * PASS;
            columns[pass] = (column < column_count ? column : column_count - 1) * pitch_chunks + chunk;
        }
    }

    // Begins to copy the next step into a stage.
    __device__ __forceinline__ void fetch(SharedAddress stage) {
#pragma unroll
        for (unsigned pass = 0; pass < ROW_PASSES; ++pass) {
            if ((pass + 1) * PASS <= T::ROW_LINES || line + pass * PASS < T::ROW_LINES) {
                copy_async_16(stage + place + pass * PASS * STEP,
                              planes + static_cast<unsigned long long>(rows[pass]) * CHUNK);
            }
            rows[pass] += LINE_CHUNKS;
        }
#pragma unroll
        for (unsigned pass = 0; pass < COLUMN_PASSES; ++pass) {
            if ((pass + 1) * PASS <= T::COLUMNS || line + pass * PASS < T::COLUMNS) {
                copy_async_16(stage + T::ROW_LINES * STEP + place + pass * PASS * STEP,
                              weights + static_cast<unsigned long long>(columns[pass]) * CHUNK);
            }
            columns[pass] += LINE_CHUNKS;
        }
    }
};

// What a warp multiplies at once: 32 bytes of each of its lines.
template <class T>
struct Fragments {
    unsigned rows[T::LIMBS][T::FRAGMENTS_DOWN][4];
    unsigned columns[T::FRAGMENTS_ACROSS / 2][4];
};

// Where a lane finds its part of them in a stage.
template <class T>
struct Reader {
    SharedAddress rows;
    SharedAddress columns;

    __device__ __forceinline__ Reader(unsigned warp, unsigned lane) {
        // Matrices 0 to 3 of the rows: the first and last eight rows, then the same of the next 16 bytes.
        const unsigned row = warp % T::DOWN * T::WARP_ROWS + lane % 16;
        rows = swizzled(row, lane / 16);
        // Of the columns: two chunks of the first eight, then of the last eight.
        const unsigned column = warp / T::DOWN * T::WARP_COLUMNS + lane / 16 * 8 + lane % 8;
        columns = T::ROW_LINES * STEP + swizzled(column, lane / 8 % 2);
    }

    // Loads the first or second half of a stage's lines. The halves are chunks `c` and `c ^ 2`, and the places of
    // lines that are 16 apart differ by the lines alone.
    __device__ __forceinline__ void load(Fragments<T>& fragments, SharedAddress stage, unsigned half) const {
        const SharedAddress first_row = stage + (rows ^ (half * 2 * CHUNK));
        const SharedAddress first_column = stage + (columns ^ (half * 2 * CHUNK));
#pragma unroll
        for (unsigned pair = 0; pair < T::FRAGMENTS_ACROSS / 2; ++pair) {
            load_matrices(fragments.columns[pair], first_column + pair * 16 * STEP);
        }
#pragma unroll
        for (unsigned limb = 0; limb < T::LIMBS; ++limb) {
#pragma unroll
            for (unsigned down = 0; down < T::FRAGMENTS_DOWN; ++down) {
                load_matrices(fragments.rows[limb][down], first_row + (limb * T::ROWS + down * 16) * STEP);
            }
        }
    }
};
