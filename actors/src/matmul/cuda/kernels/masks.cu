// The expansion of masks: ChaCha (RFC 8439) with 8 rounds, as `protocol::he::mask` defines it, straight into the layout of
// a product's rows.
//
// With `n` rows and `L` limbs, byte `(i·L + l)·n + r` of the keystream is limb `l` of row `r` and feature `i`. As `n` is
// a multiple of 64, a 64-byte block of the keystream is 64 consecutive rows of one limb of one feature. A thread makes
// one such block, a block of threads those of 128 neighbouring features, and turns them in shared memory so that each row
// is written in runs of 128 bytes.
//
// The masks of a product are made once per run of an owner, and take far less time than multiplying them: about 500
// integer instructions for 64 bytes.

// The cipher's key and nonce, as little endian words, and where the product's features begin in the domain.
struct MaskStream {
    unsigned key[8];
    unsigned nonce[3];
    unsigned first_feature;
};

// Features of a block of threads, one a thread.
constexpr unsigned MASK_FEATURES = 128;
// Rows of a block of threads: bytes of a block of the keystream.
constexpr unsigned MASK_ROWS = 64;
constexpr unsigned MASK_WORDS = MASK_ROWS / 4;
// Pairs of rounds: one of columns, one of diagonals.
constexpr unsigned DOUBLE_ROUNDS = 4;
// Words of a line of the turning table: 4 words are left out after each 16, so that eight threads that read 16 bytes
// each, 16 words apart, meet all 32 banks.
constexpr unsigned MASK_LINE = MASK_FEATURES + MASK_FEATURES / 16 * 4;

__device__ __forceinline__ unsigned rotated_left(unsigned word, unsigned bits) {
    return __funnelshift_l(word, word, bits);
}

__device__ __forceinline__ void quarter_round(unsigned& a, unsigned& b, unsigned& c, unsigned& d) {
    a += b;
    d = rotated_left(d ^ a, 16);
    c += d;
    b = rotated_left(b ^ c, 12);
    a += b;
    d = rotated_left(d ^ a, 8);
    c += d;
    b = rotated_left(b ^ c, 7);
}

// Block `counter` of the keystream.
__device__ __forceinline__ void chacha_block(const MaskStream& stream, unsigned counter, unsigned (&words)[MASK_WORDS]) {
    const unsigned begin[MASK_WORDS] = {
        0x61707865,    0x3320646e,    0x79622d32,    0x6b206574,    stream.key[0], stream.key[1],
        stream.key[2], stream.key[3], stream.key[4], stream.key[5], stream.key[6], stream.key[7],
        counter,       stream.nonce[0], stream.nonce[1], stream.nonce[2],
    };
#pragma unroll
    for (unsigned i = 0; i < MASK_WORDS; ++i) {
        words[i] = begin[i];
    }
#pragma unroll
    for (unsigned round = 0; round < DOUBLE_ROUNDS; ++round) {
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            quarter_round(words[i], words[4 + i], words[8 + i], words[12 + i]);
        }
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            quarter_round(words[i], words[4 + (i + 1) % 4], words[8 + (i + 2) % 4], words[12 + (i + 3) % 4]);
        }
    }
#pragma unroll
    for (unsigned i = 0; i < MASK_WORDS; ++i) {
        words[i] += begin[i];
    }
}

// Transposes 4 × 4 bytes: byte `j` of word `i` of `columns` becomes byte `i` of word `j` of `rows`.
__device__ __forceinline__ void transpose_bytes(const uint4& columns, unsigned (&rows)[4]) {
    const unsigned low01 = __byte_perm(columns.x, columns.y, 0x5140), high01 = __byte_perm(columns.x, columns.y, 0x7362);
    const unsigned low23 = __byte_perm(columns.z, columns.w, 0x5140), high23 = __byte_perm(columns.z, columns.w, 0x7362);
    rows[0] = __byte_perm(low01, low23, 0x5410);
    rows[1] = __byte_perm(low01, low23, 0x7632);
    rows[2] = __byte_perm(high01, high23, 0x5410);
    rows[3] = __byte_perm(high01, high23, 0x7632);
}

// Writes `planes`, [limb][row][pitch], with zeros behind the features; `rows` is a multiple of 64, `pitch` of 16, and
// `planes` begins at a multiple of 16. Grid: (blocks of the keystream a feature) × (runs of 128 features).
extern "C" __global__ void __launch_bounds__(MASK_FEATURES)
velum_expand_masks(unsigned char* planes, MaskStream stream, unsigned features, unsigned rows, unsigned limbs,
                   unsigned pitch) {
    __shared__ uint4 turned[MASK_WORDS * MASK_LINE / 4];
    unsigned* const table = reinterpret_cast<unsigned*>(turned);

    const unsigned thread = threadIdx.x;
    const unsigned first_feature = blockIdx.y * MASK_FEATURES;
    const unsigned feature = first_feature + thread;
    const unsigned column_blocks = rows / MASK_ROWS * limbs;
    unsigned words[MASK_WORDS] = {};
    if (feature < features) {
        chacha_block(stream, (stream.first_feature + feature) * column_blocks + blockIdx.x, words);
    }
#pragma unroll
    for (unsigned i = 0; i < MASK_WORDS; ++i) {
        table[i * MASK_LINE + thread + thread / 16 * 4] = words[i];
    }
    __syncthreads();

    // From here on a thread has 16 features of four rows.
    const unsigned run = thread % (MASK_FEATURES / 16), word = thread / (MASK_FEATURES / 16);
    unsigned bytes[4][4]; // [four features][row]
#pragma unroll
    for (unsigned four = 0; four < 4; ++four) {
        transpose_bytes(turned[(word * MASK_LINE + run * 20) / 4 + four], bytes[four]);
    }
    const unsigned column = first_feature + run * 16;
    if (column >= pitch) {
        return;
    }
    // Blocks of the keystream follow one another as runs of 64 rows do in the planes, from limb to limb.
    const unsigned long long row = static_cast<unsigned long long>(blockIdx.x) * MASK_ROWS + word * 4;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        const uint4 line = make_uint4(bytes[0][i], bytes[1][i], bytes[2][i], bytes[3][i]);
        *reinterpret_cast<uint4*>(planes + (row + i) * pitch + column) = line;
    }
}
