/* What generating a token consists of, for fast.py: a row of activations x times a
   matrix, ternary (ternary_product) or of float16 (half_product), and the attention of
   that one token. Each number of a matrix, or of the cache, is used once, so that the
   time goes into reading it from memory.

   No instruction is named here. GCC's vector types stand for the processor's registers:

       floats a, b;                  W floats side by side, in one register
       a + b                         W sums, in one instruction
       __builtin_shuffle(a, index)   W look-ups, in one instruction: element e of the
                                     result is a[index[e] % W]

   "#pragma omp parallel" shares a loop out to the threads, and "#pragma omp simd" lets
   the compiler add a sum up in several registers. A compiler that has none of these
   fails, and PyTorch does the work. */

#include <math.h>

/* W depends on the processor: 16 floats in a register of 512 bits (AVX-512), 8 in one
   of 256 (AVX2), 4 in one of 128. The compiler knows it as the largest alignment in
   bytes that any type needs. */
enum { W = __BIGGEST_ALIGNMENT__ > 32 ? 16 : __BIGGEST_ALIGNMENT__ > 16 ? 8 : 4 };

typedef float floats __attribute__((vector_size(4 * W)));
typedef unsigned words __attribute__((vector_size(4 * W), aligned(1))); /* anywhere */


/* ---- The ternary product: y = codes @ x -------------------------------------------

   A code takes two bits: 0 is 00, +1 is 01, -1 is 11, and 10 does not occur. Neither
   unpacking the codes nor multiplying by them would keep up with the memory. Instead,
   what a code makes of x[i] is looked up in a table whose index is the code itself:

       code           00     01     10      11
       table entry     0    x[i]   (0)    -x[i]

   A table of 16 floats serves two neighbours at once: four bits are an index, and the
   16 sums that two codes can give stand in it,

       index          0000   0001    0011    0100     0101            0111       ...
       table entry    0      x[i]    -x[i]   x[i+1]   x[i+1]+x[i]   x[i+1]-x[i]  ...

   One register holds this table, and one look-up and one addition deal with 2 weights
   of each of 16 rows, or 32 weights. The tables depend on x alone. So they are made
   once, one for every two columns, and serve all rows of the matrix.

   A register of 8 or 4 floats cannot hold 16 entries. There a table is of one code, its
   four entries repeated: 0, x[i], 0, -x[i], 0, x[i], 0, -x[i]. An index of 8 lanes has
   three bits, of which the highest belongs to the next code, and the repetition is what
   makes it not matter.

   The look-up wants the same columns of W rows side by side. Therefore a matrix is laid
   out in blocks of 64 rows: the first 4 bytes, which is one word of 16 codes, of each
   of the 64 rows, then the next 4 bytes of each, and so on. So a register of words has
   W rows, and `word >> j` brings the codes of columns j / 2 and j / 2 + 1 to its lowest
   four bits, for all of them; the bits above are no part of an index. Four registers of
   16 (R = 4; 8 of 8, 16 of 4) are 64 rows. Their sums y do not wait for one another. */

enum {
    CODES = W == 16 ? 2 : 1, /* in an index */
    ROWS = 64,               /* side by side */
    R = ROWS / W,            /* registers that hold a number of each of them */
    BITS = 32,               /* of a word */
};

/* x: (in,); packed: uint8 (out / 64, in / 16, 64, 4), as above; y: (out,). `out` must
   be a multiple of 64 and `in` of 16. The tables, 4 * W * in / CODES bytes, stand on
   each thread's stack: `in` below 2^15 makes them at most 1 MB. */
void ternary_product(const float *x, const words *packed, float *y, long out, long in)
{
    words entry; /* 0, 1, 2, ...: the entries of a table, and so their own index */
    for (int e = 0; e < W; e++)
        entry[e] = e;

    #pragma omp parallel
    {
        floats tables[in / CODES];

        /* Each thread makes the tables, for itself. Element e of one is what the code
           in the lower two bits of e makes of x[i], and with CODES = 2 what the code
           in the upper two bits makes of x[i + 1] as well. */
        floats *table = tables;
        for (long i = 0; i < in; i += CODES, table++) {
            *table = __builtin_shuffle((floats){0, x[i], 0, -x[i]}, entry & 3);
            if (CODES == 2) {
                floats second = {0, x[i + 1], 0, -x[i + 1]};
                *table += __builtin_shuffle(second, entry >> 2);
            }
        }

        #pragma omp for
        for (long begin = 0; begin < out; begin += ROWS) {
            const words *word = packed + begin / ROWS * (in / 16) * R;
            floats sums[R] = {0}; /* of the 64 rows */

            table = tables;
            while (table < tables + in / CODES) {
                /* One word of every row: 16 columns. */
                #pragma GCC unroll 16
                for (int j = 0; j < BITS; j += 2 * CODES, table++)
                    for (int r = 0; r < R; r++)
                        sums[r] += __builtin_shuffle(*table, word[r] >> j);

                /* The words after the next eight are fetched meanwhile. */
                word += R;
                for (int r = 0; r < R; r++)
                    __builtin_prefetch(word + 8 * R + r);
            }

            for (int row = 0; row < ROWS; row++)
                y[begin + row] = sums[row / W][row % W];
        }
    }
}


/* ---- The product with a float16 matrix: y = w @ x ---------------------------------

   A float16 has a sign, 5 bits of exponent and 10 of fraction; a float has a sign, 8
   and 23. Moved up by 13 bits, exponent and fraction stand where a float has them. The
   conversion from short has filled all bits above with the sign: it is at its place as
   well, and the three bits below it, the rest of the float's exponent, are made 0. An
   exponent counts from -15 in one and from -127 in the other, so what the float has is
   2^-112 of the value, for subnormal numbers too. Infinity and NaN are no such numbers,
   and do not occur: save_model refuses them. */
static float float_of_half(short half)
{
    union {
        unsigned bits;
        float value;
    } moved = {(unsigned)half << 13 & 0x8fffe000};
    return moved.value * 0x1p112f;
}

/* x: (in,); w: (out, in), float16 as its bits; y: (out,). */
void half_product(const float *x, const short *w, float *y, long out, long in)
{
    #pragma omp parallel for
    for (long r = 0; r < out; r++) {
        float sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (long i = 0; i < in; i++)
            sum += float_of_half(w[r * in + i]) * x[i];
        y[r] = sum;
    }
}


/* ---- The attention of the one token at position n ----------------------------------

   For each head, y = Σ_t softmax_t(q · k_t / √d) v_t over the positions t = 0 ... n.
   One pass does it: `most` is the highest score so far and `total` the sum of
   exp(score - most), which cannot overflow. y is the mean of the values so far; a new
   value v_t of weight exp(score - most) moves it by its share of the new total. Where a
   higher score comes, the old total is brought to the new scale, and the mean stays. */

/* qkv: (3, H, d), the token's query, key and value; cache: (2, H, S, d), the keys and
   values of the positions before n, to which the token's own are added; y: (H, d). */
void attention(
    const float *qkv, float *cache, float *y, long n, long H, long S, long d)
{
    #pragma omp parallel for
    for (long h = 0; h < H; h++) {
        const float *query = qkv + h * d;
        float *mean = y + h * d;
        float *key = cache + h * S * d;
        float *value = key + H * S * d;

        for (long i = 0; i < d; i++) {
            key[n * d + i] = query[H * d + i];
            value[n * d + i] = query[2 * H * d + i];
            mean[i] = 0;
        }

        float most = -INFINITY;
        float total = 0;
        for (long t = 0; t <= n; t++, key += d, value += d) {
            float score = 0;
            #pragma omp simd reduction(+ : score)
            for (long i = 0; i < d; i++)
                score += query[i] * key[i];
            score /= sqrtf(d);

            if (score > most) {
                total *= expf(most - score);
                most = score;
            }
            float weight = expf(score - most);
            total += weight;

            float share = weight / total;
            for (long i = 0; i < d; i++)
                mean[i] += share * (value[i] - mean[i]);
        }
    }
}
