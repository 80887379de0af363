/* Generating a token in C, for fast.py: a ternary layer for one row of activations
   (ternary_layer), and the step of one token through a whole GPT (token_step).

   A register holds W numbers. The vector types of GCC and clang stand for one: if a and
   b are `floats`, a + b is W sums in one instruction. "omp parallel" starts threads,
   and "omp for" gives each a part of a loop and goes on when all are done. */

#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0 /* one thread does all */
#endif

/* ---- What differs between processors: read_table fills a register with a table (or
   its repetitions), select(t, i) looks W numbers up, t[the lowest bits of i[e]], and
   widen makes W float16 numbers floats. */

#define read_table(from) *(from)
#if defined(__AVX512F__)
#include <immintrin.h>
#define W 16
#define select(t, i) _mm512_permutexvar_ps((__m512i)(i), (__m512)(t))
#define widen(from) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from)))

#elif defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#define W 8
#undef read_table
#define read_table(from) _mm256_broadcast_ps((const __m128 *)(from))
#define select(t, i) _mm256_permutevar_ps((__m256)(t), (__m256i)(i))
#define widen(from) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from)))

#elif defined(__aarch64__)
#include <arm_neon.h>
#define W 4
/* Arm looks bytes up. Number i of a table is its bytes 4 i to 4 i + 3. */
#define bytes_of(i) (uint8x16_t)(((i) & 3) * 0x04040404 + 0x03020100)
#define select(t, i) vqtbl1q_u8((uint8x16_t)(t), bytes_of(i))
#define widen(from) vcvt_f32_f16(vld1_f16((const __fp16 *)(from)))

#else /* plain C */
#define W 4
#define select(t, i) {t[i[0] & 3], t[i[1] & 3], t[i[2] & 3], t[i[3] & 3]}
#define widen(h) {number((h)[0]), number((h)[1]), number((h)[2]), number((h)[3])}
/* Exponent (5 bits, from -15) and fraction (10) move to where a float has its own (8,
   from -127, and 23). The sign is there already; infinity and NaN do not occur. */
static float number(short half)
{
    union { unsigned bits; float value; } moved = {(unsigned)half << 13 & 0x8fffe000};
    return moved.value * 0x1p112f;
}
#endif

#define CODES (W == 16 ? 2 : 1) /* that one table serves, as explained below */
typedef float floats __attribute__((vector_size(4 * W)));
typedef unsigned words __attribute__((vector_size(4 * W), aligned(1)));
typedef float table __attribute__((vector_size(4 << 2 * CODES))); /* 16, or 4 */

/* ---- A ternary layer: y = scale * (codes @ x) + bias -------------------------------

   A code takes two bits: 0 is 00, +1 is 01, -1 is 11, and 10 does not occur. To unpack
   and to multiply takes longer than to read a code from memory. Instead, what it makes
   of x[i] is looked up in a table whose index is the code itself:

       code           00     01     10      11
       table entry     0    x[i]   (0)    -x[i]

   A register of 16 floats has room for a table that serves two neighbours at once: four
   bits are an index, and the 16 sums that two codes can give stand in it,

       index          0000   0001    0011    0100     0101            0111       ...
       table entry    0      x[i]    -x[i]   x[i+1]   x[i+1]+x[i]   x[i+1]-x[i]  ...

   One look-up and one addition deal with W rows, whose codes stand side by side: of 64
   rows come the first 4 bytes of each, which is one word of 16 codes, then the next 4
   bytes of each, and so on. The lowest bits of a register of words are the indices for
   the first column (or two). Shifted, they are those for the next; bits above do not
   matter. After four codes the words are read again, one byte further. */

enum { ROWS = 64, R = 4 }; /* rows side by side; registers of words, and of sums */
typedef struct { floats of[R]; } sums;
typedef struct {
    const unsigned char *codes; /* (out / 64, in / 16, 64, 4), and 4 bytes behind it */
    const float *scale, *bias;  /* (1,) or (out,); (out,), or NULL */
    long long step;             /* from the scale of one row to the next: 0, or 1 */
} linear;

#if CODES == 2
#define table_of(a, b) \
    {0, a, 0, -a, b, b + a, b, b - a, 0, a, 0, -a, -b, a - b, -b, -a - b}
#else
#define table_of(a, b) {0, a, 0, -a}
#endif

/* The sums of 4 W rows with `in` columns more, from the first of their codes on. */
static sums add_up(const unsigned char *codes, const volatile table *t, long in, sums y)
{
    for (long i = 0; i < in; i += 16, codes += 4 * ROWS) {
        for (int r = 0; r < R; r++)
            __builtin_prefetch(codes + 8 * 4 * ROWS + r * sizeof(words));
        #pragma GCC unroll 1
        for (int byte = 0; byte < 4; byte++) {
            words index[R]; /* volatile: what is read stays in a register */
            for (int r = 0; r < R; r++)
                index[r] = *(const volatile words *)(codes + byte + r * sizeof(words));

            #pragma GCC unroll 4
            for (int j = 0; j < 4; j += CODES, t++) {
                floats entries = read_table(t);
                for (int r = 0; r < R; r++) {
                    y.of[r] += (floats)select(entries, index[r]);
                    index[r] >>= 2 * CODES;
                }
            }
        }
    }
    return y;
}

/* For all threads together. x: (in,); y: (out,), which the result is added to if `adds`
   is set; tables: room for 8 in floats a thread. out is a multiple of 64, in of 16. */
static void multiply(const linear *layer, const float *x, float *y, int adds,
                     table *tables, long out, long in)
{
    tables += omp_get_thread_num() * (in / CODES);
    for (long i = 0; i < in; i += CODES)
        tables[i / CODES] = (table)table_of(x[i], x[i + 1]);

    #pragma omp for
    for (long begin = 0; begin < out; begin += ROWS) {
        const unsigned char *block = layer->codes + begin * (in / 4);
        union { sums of[ROWS / W / R]; float row[ROWS]; } sum = {0};

        /* 128 columns at a time, whose codes and tables are then near for all rows. */
        for (long i = 0; i < in; i += 128, block += 128 / 4 * ROWS)
            for (int k = 0; k < ROWS / W / R; k++)
                sum.of[k] = add_up(block + k * R * sizeof(words), tables + i / CODES,
                                   in - i < 128 ? in - i : 128, sum.of[k]);

        for (int row = 0; row < ROWS; row++) {
            long o = begin + row;
            float scaled = layer->scale[o * layer->step] * sum.row[row];
            y[o] = scaled + (layer->bias ? layer->bias[o] : 0) + (adds ? y[o] : 0);
        }
    }
}

void ternary_layer(const linear *layer, const float *x, float *y, table *tables,
                   long out, long in, long threads)
{
    #pragma omp parallel num_threads(threads)
    multiply(layer, x, y, 0, tables, out, in);
}

/* ---- The rest of a GPT, as in tsld.py; for all threads together, too ------------ */

typedef struct { const float *weight, *bias; } norm; /* (width,) each */

static void normalize(const norm *norm, const float *x, float *y, long width)
{
    #pragma omp single /* by one thread; the others wait */
    {
        float sum = 0, squares = 0;
        #pragma omp simd reduction(+ : sum)
        for (long i = 0; i < width; i++)
            sum += x[i];
        float mean = sum / width;
        #pragma omp simd reduction(+ : squares)
        for (long i = 0; i < width; i++)
            squares += (x[i] - mean) * (x[i] - mean);
        float factor = 1 / sqrtf(squares / width + 1e-5f);
        for (long i = 0; i < width; i++)
            y[i] = (x[i] - mean) * factor * norm->weight[i] + norm->bias[i];
    }
}

/* e^z, to a few 1e-7 of it, as 2^whole * e^rest: the whole number goes to where a float
   has its exponent, and the rest, of at most ln 2 / 2, into the series. */
static inline float exponential(float z)
{
    z = z < -87 ? -87 : z > 87 ? 87 : z;
    float whole = rintf(z * 1.44269504f);
    float rest = z - whole * 0.693359375f + whole * 2.12194440e-4f; /* z - whole ln 2 */
    union { unsigned bits; float value; } power = {(unsigned)(whole + 127) << 23};
    float series = 1 / 6.f + rest * (1 / 24.f + rest * (1 / 120.f + rest / 720));
    return power.value * (1 + rest * (1 + rest * (1 / 2.f + rest * series)));
}

/* GELU in its tanh approximation: x (1 + tanh u) / 2 = x / (1 + e^-2u). */
static void gelu(float *x, long width)
{
    #pragma omp for simd
    for (long i = 0; i < width; i++) {
        float u = 0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        x[i] /= 1 + exponential(-2 * u);
    }
}

/* The attention of the token at position n: for each head the sum, over t = 0 ... n, of
   softmax_t(q . k_t / sqrt d) v_t, in one pass. `most` is the highest score so far,
   `total` the sum of e^(score - most), and y the mean of the values, which a new one
   moves by its share of the total. qkv: (3, H, d), the token's query, key and value;
   cache: (2, H, S, d), keys and values of the positions before n, and n's; y: (H, d) */
static void attend(const float *qkv, float *cache, float *y, long n,
                   long H, long S, long d)
{
    #pragma omp for
    for (long h = 0; h < H; h++) {
        const float *query = qkv + h * d;
        float *mean = y + h * d;
        float *key = cache + h * S * d, *value = key + H * S * d;
        for (long i = 0; i < d; i++) {
            key[n * d + i] = query[H * d + i];
            value[n * d + i] = query[2 * H * d + i];
            mean[i] = 0;
        }

        float most = -INFINITY, total = 0;
        for (long t = 0; t <= n; t++, key += d, value += d) {
            float score = 0;
            #pragma omp simd reduction(+ : score)
            for (long i = 0; i < d; i++)
                score += query[i] * key[i];
            score /= sqrtf(d);

            if (score > most) {
                total *= exponential(most - score);
                most = score;
            }
            float weight = exponential(score - most);
            total += weight;
            for (long i = 0; i < d; i++)
                mean[i] += weight / total * (value[i] - mean[i]);
        }
    }
}

/* y = w @ x. w: float16 (out, in), in a multiple of 64. */
static void half_product(const short *w, const float *x, float *y, long out, long in)
{
    #pragma omp for
    for (long o = 0; o < out; o++) {
        floats sums[R] = {0};
        for (long i = 0; i < in; i += R * W)
            for (int r = 0; r < R; r++) {
                floats weights = (floats)widen(w + o * in + i + r * W);
                sums[r] += weights * *(const floats *)(x + i + r * W);
            }
        floats sum = sums[0] + sums[1] + sums[2] + sums[3];
        y[o] = sum[0];
        for (int e = 1; e < W; e++)
            y[o] += sum[e];
    }
}

typedef struct {
    norm ln_1; linear c_attn, c_proj; /* attention */
    norm ln_2; linear c_fc, c_down;   /* MLP, where c_down is called c_proj */
} block;

typedef struct {
    const short *wte, *wpe, *lm_head; /* float16 (V, C), (S or more, C), (V, C) */
    norm ln_f; block h[]; /* n_layer of them */
} gpt;

/* The step of the token at position n. cache: for each layer, as `attend` takes it;
   logits: (V,), or NULL if nobody asks what follows; work: room for 6 C floats and 32 C
   a thread. C is a multiple of 64, and the arrays begin at multiples of 64 bytes. */
void token_step(const gpt *model, float *cache, float *logits, float *work, long token,
                long n, long n_layer, long H, long C, long V, long S, long threads)
{
    float *x = work, *y = x + C; /* (C,) each; each layer adds to x */
    float *inner = y + C;        /* (4 C,) */
    table *tables = (table *)(inner + 4 * C);

    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for
        for (long i = 0; i < C; i += W)
            *(floats *)(x + i) = (floats)widen(model->wte + token * C + i) +
                                 (floats)widen(model->wpe + n * C + i);

        for (long l = 0; l < n_layer; l++) {
            const block *block = &model->h[l];
            normalize(&block->ln_1, x, y, C);
            multiply(&block->c_attn, y, inner, 0, tables, 3 * C, C);
            attend(inner, cache + l * 2 * S * C, y, n, H, S, C / H);
            multiply(&block->c_proj, y, x, 1, tables, C, C);

            normalize(&block->ln_2, x, y, C);
            multiply(&block->c_fc, y, inner, 0, tables, 4 * C, C);
            gelu(inner, 4 * C);
            multiply(&block->c_down, inner, x, 1, tables, C, 4 * C);
        }
        normalize(&model->ln_f, x, y, C);
        if (logits)
            half_product(model->lm_head, y, logits, V, C);
    }
}
