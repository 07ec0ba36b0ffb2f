/* The loops over elements, compiled: addresses in, sums or a merged tensor out.
 *
 * Only `compiled.py` calls this file. It knows nothing of tensors, threads or files, and
 * releases the interpreter's lock while it runs. Every operation is rounded separately,
 * in an order fixed here, so that the bits do not depend on the processor. Loops have no
 * branches, so that compilers turn them into vector instructions.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "sums must be formed in the order that is written"
#endif

/* A copy of each loop for each generation of x86 processors, chosen at run time. With
 * avx512f alone, conversions of 16-bit numbers stay in half vectors (docs/log.md). */
#if !defined(__x86_64__) || !defined(__GLIBC__)
#define FOR_EVERY_CPU
#else
#if defined(__clang__)
#define WIDEST "avx512bw"
#elif __GNUC__ >= 12
#define WIDEST "arch=x86-64-v4"
#else
#define WIDEST "avx512f"
#endif
#define FOR_EVERY_CPU __attribute__((target_clones(WIDEST, "avx2", "default")))
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* Elements per block, few enough for the first-level cache (512 were faster than 256
 * and 1,024; docs/log.md). */
#define BLOCK 512
/* Running sums of a block; BLOCK is a multiple of it. */
#define LANES 32
/* Bytes of a cache line. */
#define LINE 64

/* ---- one element: as it is stored, and as a number ---- */

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* All bits set where the condition holds. */
INLINE uint32_t mask(int condition) { return 0u - (uint32_t)condition; }

INLINE double from_float64(double stored) { return stored; }

INLINE float from_float32(float stored) { return stored; }

INLINE float from_bfloat16(uint16_t stored) { return float_of((uint32_t)stored << 16); }

INLINE float from_float16(uint16_t stored) {
    uint32_t x = stored, exponent = x & 0x7c00u;
    uint32_t special = mask(exponent == 0x7c00u), subnormal = mask(exponent == 0);
    /* The exponent's bias is 15 there and 127 here; of infinity and NaN, 31 and 255. */
    uint32_t normal = ((x & 0x7fffu) << 13) + (112u << 23) + (special & (112u << 23));
    uint32_t small = bits_of((float)(int32_t)(x & 0x3ffu) * (1.0f / (1 << 24)));
    uint32_t magnitude = (subnormal & small) | (~subnormal & normal);
    return float_of(magnitude | (x & 0x8000u) << 16);
}

INLINE double to_float64(double value) { return value; }

INLINE float to_float32(float value) { return value; }

/* To the nearest, ties to even, as everywhere; a carry goes into the exponent. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value), nan = mask((bits & 0x7fffffffu) > 0x7f800000u);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((nan & 0x7fc0u) | (~nan & rounded));
}

INLINE uint16_t to_float16(float value) {
    uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    uint32_t nan = mask(magnitude > 0x7f800000u);
    uint32_t large = mask(magnitude >= 143u << 23); /* 2^16 */
    uint32_t small = mask(magnitude < 113u << 23);  /* 2^-14 */
    uint32_t odd = (magnitude >> 13) & 1u;
    uint32_t normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
    /* Of 1/2 + x the last bits count multiples of 2^-24. */
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - (126u << 23);
    uint32_t result = (small & subnormal) | (~small & ~large & normal) |
                      (large & (0x7c00u | (nan & 0x200u)));
    return (uint16_t)(result | ((bits >> 16) & 0x8000u));
}

/* ---- squared norms ---- */

INLINE double sum_of_lanes(double *sums) {
    for (size_t width = LANES / 2; width; width /= 2)
        for (size_t j = 0; j < width; j++) sums[j] += sums[j + width];
    return sums[0];
}

/* sum of a_i^2 over n elements, padded with zeros to a multiple of LANES. */
INLINE double sum_of_squares(const double *a, size_t n) {
    double sums[LANES] = {0};
    for (size_t i = 0; i < n; i += LANES)
        for (size_t j = 0; j < LANES; j++) sums[j] += a[i + j] * a[i + j];
    return sum_of_lanes(sums);
}

/* sums[k] = ||tuned[k] - base||^2, and if `own` sums[count] = ||base||^2, in float64,
 * summed in lanes and block by block. */
typedef void sq_norms_loop(const void *base, const void *const *tuned, size_t count,
                           size_t n, int own, double *sums);

#define DEFINE_SQ_NORMS(NAME, STORED)                                                  \
    INLINE void widen_##NAME(const STORED *from, double *to, size_t n) {               \
        for (size_t i = 0; i < n; i++) to[i] = (double)from_##NAME(from[i]);           \
        for (size_t i = n; i % LANES; i++) to[i] = 0;                                  \
    }                                                                                  \
    /* sum of (from_i - b_i)^2 over n elements */                                      \
    INLINE double squares_##NAME(const STORED *from, const double *b, size_t n) {      \
        double sums[LANES] = {0};                                                      \
        size_t whole = n / LANES * LANES;                                              \
        for (size_t i = 0; i < whole; i += LANES)                                      \
            for (size_t j = 0; j < LANES; j++) {                                       \
                double difference = (double)from_##NAME(from[i + j]) - b[i + j];       \
                sums[j] += difference * difference;                                    \
            }                                                                          \
        for (size_t j = 0; whole + j < n; j++) {                                       \
            double difference = (double)from_##NAME(from[whole + j]) - b[whole + j];   \
            sums[j] += difference * difference;                                        \
        }                                                                              \
        return sum_of_lanes(sums);                                                     \
    }                                                                                  \
    FOR_EVERY_CPU                                                                      \
    static void sq_norms_##NAME(const void *base, const void *const *tuned,            \
                                size_t count, size_t n, int own, double *sums) {       \
        double reference[BLOCK];                                                       \
        for (size_t at = 0; at < n; at += BLOCK) {                                     \
            size_t size = n - at < BLOCK ? n - at : BLOCK;                             \
            widen_##NAME((const STORED *)base + at, reference, size);                  \
            for (size_t k = 0; k < count; k++) {                                       \
                const STORED *values = (const STORED *)tuned[k] + at;                  \
                sums[k] += squares_##NAME(values, reference, size);                    \
            }                                                                          \
            if (own) sums[count] += sum_of_squares(reference, size);                   \
        }                                                                              \
    }

DEFINE_SQ_NORMS(float64, double)
DEFINE_SQ_NORMS(float32, float)
DEFINE_SQ_NORMS(float16, uint16_t)
DEFINE_SQ_NORMS(bfloat16, uint16_t)

/* ---- Gram matrices ---- */

/* sums[r] += sum of a_i rows[r]_i over n elements, for several rows at a time, so that
 * each a_i is loaded once for all of them. */
#define DEFINE_DOTS(NAME, ROWS, WIDE)                                                  \
    INLINE void NAME(const double *a, const double *rows, size_t n,                    \
                     double *sums) {                                                   \
        double lanes[ROWS][WIDE] = {{0}};                                              \
        for (size_t i = 0; i < n; i += WIDE)                                           \
            for (size_t r = 0; r < ROWS; r++)                                          \
                for (size_t j = 0; j < WIDE; j++)                                      \
                    lanes[r][j] += a[i + j] * rows[r * BLOCK + i + j];                 \
        for (size_t r = 0; r < ROWS; r++) {                                            \
            for (size_t width = WIDE / 2; width; width /= 2)                           \
                for (size_t j = 0; j < width; j++) lanes[r][j] += lanes[r][j + width]; \
            sums[r] += lanes[r][0];                                                    \
        }                                                                              \
    }

DEFINE_DOTS(dot_4, 4, LANES / 2)
DEFINE_DOTS(dot_1, 1, LANES / 2)
DEFINE_DOTS(dot_own, 1, LANES) /* for a with itself: the bits of sum_of_squares */

/* gram[k][l] = <tuned[k] - base, tuned[l] - base> for l <= k; its diagonal has the bits
 * of sq_norms. `taus` has room for a block of each model. */
typedef void gram_loop(const void *base, const void *const *tuned, size_t count,
                       size_t n, double *taus, double *gram);

#define DEFINE_GRAM(NAME, STORED)                                                      \
    FOR_EVERY_CPU                                                                      \
    static void gram_##NAME(const void *base, const void *const *tuned, size_t count,  \
                            size_t n, double *taus, double *gram) {                    \
        double reference[BLOCK];                                                       \
        for (size_t at = 0; at < n; at += BLOCK) {                                     \
            size_t size = n - at < BLOCK ? n - at : BLOCK, l;                          \
            size_t whole = (size + LANES - 1) / LANES * LANES;                         \
            widen_##NAME((const STORED *)base + at, reference, size);                  \
            for (size_t k = 0; k < count; k++) {                                       \
                double *tau = taus + k * BLOCK, *row = gram + k * count;               \
                const STORED *values = (const STORED *)tuned[k] + at;                  \
                for (size_t i = 0; i < size; i++)                                      \
                    tau[i] = (double)from_##NAME(values[i]) - reference[i];            \
                for (size_t i = size; i < whole; i++) tau[i] = 0;                      \
                for (l = 0; l + 4 <= k; l += 4)                                        \
                    dot_4(tau, taus + l * BLOCK, whole, row + l);                      \
                for (; l < k; l++) dot_1(tau, taus + l * BLOCK, whole, row + l);       \
                dot_own(tau, tau, whole, row + k);                                     \
            }                                                                          \
        }                                                                              \
    }

DEFINE_GRAM(float64, double)
DEFINE_GRAM(float32, float)
DEFINE_GRAM(float16, uint16_t)
DEFINE_GRAM(bfloat16, uint16_t)

/* ---- scaled sum ---- */

/* out = base - sum_k factors[k] (base - tuned[k]), or sum_k factors[k] tuned[k] if base
 * is NULL; rounded once. Computed in float32 if `narrow`, but again in float64 for
 * blocks that are not finite; otherwise in float64. Returns whether all of out is
 * finite; for float64 that is not checked. */
typedef int scaled_sum_loop(const void *base, const void *const *tuned,
                             const double *factors, size_t count, size_t n, int narrow,
                             void *out);

/* The bits of the smallest float that is rounded to infinity. */
#define LIMIT_float64 0xffffffffu
#define LIMIT_float32 0x7f800000u
#define LIMIT_bfloat16 0x7f7f8000u
#define LIMIT_float16 0x477ff000u

/* One block of it, computed with type R; returns whether all of it is finite. */
#define DEFINE_BLOCK(NAME, STORED, R)                                                  \
    INLINE int sum_block_##NAME##_##R(const STORED *base, const void *const *tuned,    \
                                      const double *factors, size_t count, size_t at,  \
                                      size_t size, STORED *out) {                      \
        R reference[BLOCK], total[BLOCK];                                              \
        uint32_t largest = 0;                                                          \
        for (size_t i = 0; i < size; i++) total[i] = 0;                                \
        if (base)                                                                      \
            for (size_t i = 0; i < size; i++) reference[i] = (R)from_##NAME(base[i]);  \
        for (size_t k = 0; k < count; k++) {                                           \
            const STORED *values = (const STORED *)tuned[k] + at;                      \
            R factor = (R)factors[k];                                                  \
            if (base)                                                                  \
                for (size_t i = 0; i < size; i++)                                      \
                    total[i] += factor * (reference[i] - (R)from_##NAME(values[i]));   \
            else if (k == 0) /* 0 + -0 would lose a sign */                            \
                for (size_t i = 0; i < size; i++)                                      \
                    total[i] = factor * (R)from_##NAME(values[i]);                     \
            else                                                                       \
                for (size_t i = 0; i < size; i++)                                      \
                    total[i] += factor * (R)from_##NAME(values[i]);                    \
        }                                                                              \
        if (base)                                                                      \
            for (size_t i = 0; i < size; i++) total[i] = reference[i] - total[i];      \
        for (size_t i = 0; i < size; i++) {                                            \
            uint32_t magnitude = bits_of((float)total[i]) & 0x7fffffffu;               \
            largest = magnitude > largest ? magnitude : largest;                       \
        }                                                                              \
        for (size_t i = 0; i < size; i++) out[i] = to_##NAME(total[i]);                \
        return largest < LIMIT_##NAME;                                                 \
    }

#define DEFINE_SCALED_SUM(NAME, STORED, FIRST)                                         \
    FOR_EVERY_CPU                                                                      \
    static int scaled_sum_##NAME(const void *base, const void *const *tuned,           \
                                 const double *factors, size_t count, size_t n,        \
                                 int narrow, void *out) {                              \
        int finite = 1;                                                                \
        for (size_t at = 0; at < n; at += BLOCK) {                                     \
            size_t size = n - at < BLOCK ? n - at : BLOCK;                             \
            const STORED *reference = base ? (const STORED *)base + at : NULL;         \
            STORED *merged = (STORED *)out + at;                                       \
            if (narrow && FIRST(reference, tuned, factors, count, at, size, merged))   \
                continue;                                                              \
            finite &= sum_block_##NAME##_double(reference, tuned, factors, count, at,  \
                                                size, merged);                         \
        }                                                                              \
        return finite;                                                                 \
    }

DEFINE_BLOCK(float32, float, float)
DEFINE_BLOCK(float16, uint16_t, float)
DEFINE_BLOCK(bfloat16, uint16_t, float)
DEFINE_BLOCK(float64, double, double)
DEFINE_BLOCK(float32, float, double)
DEFINE_BLOCK(float16, uint16_t, double)
DEFINE_BLOCK(bfloat16, uint16_t, double)
DEFINE_SCALED_SUM(float64, double, sum_block_float64_double)
DEFINE_SCALED_SUM(float32, float, sum_block_float32_float)
DEFINE_SCALED_SUM(float16, uint16_t, sum_block_float16_float)
DEFINE_SCALED_SUM(bfloat16, uint16_t, sum_block_bfloat16_float)

/* ---- for Python ---- */

/* In the order of compiled.DTYPES. */
static const struct {
    sq_norms_loop *sq_norms;
    gram_loop *gram;
    scaled_sum_loop *scaled_sum;
} LOOPS[] = {
    {sq_norms_float64, gram_float64, scaled_sum_float64},
    {sq_norms_float32, gram_float32, scaled_sum_float32},
    {sq_norms_float16, gram_float16, scaled_sum_float16},
    {sq_norms_bfloat16, gram_bfloat16, scaled_sum_bfloat16},
};

/* Allocates an address and a number for each model, to be freed by PyMem_Free. */
static int take(int dtype, Py_ssize_t n, PyObject *addresses, const void ***tuned,
                double **numbers) {
    Py_ssize_t count = PyTuple_Size(addresses);
    if (count < 0) return 0;
    if (dtype < 0 || (size_t)dtype >= sizeof LOOPS / sizeof *LOOPS || n < 0) {
        PyErr_SetString(PyExc_ValueError, "unknown dtype, or a negative size");
        return 0;
    }
    *tuned = PyMem_Malloc((size_t)count * (sizeof **tuned + sizeof **numbers) +
                            sizeof **numbers);
    if (!*tuned) {
        PyErr_NoMemory();
        return 0;
    }
    *numbers = (double *)(*tuned + count);
    (*numbers)[count] = 0;
    for (Py_ssize_t k = 0; k < count; k++) {
        (*tuned)[k] = PyLong_AsVoidPtr(PyTuple_GetItem(addresses, k));
        (*numbers)[k] = 0;
    }
    if (!PyErr_Occurred()) return 1;
    PyMem_Free(*tuned);
    return 0;
}

static PyObject *list_of(const double *values, Py_ssize_t count) {
    PyObject *list = PyList_New(count);
    for (Py_ssize_t k = 0; list && k < count; k++) {
        PyObject *value = PyFloat_FromDouble(values[k]);
        if (!value || PyList_SetItem(list, k, value) < 0) Py_CLEAR(list);
    }
    return list;
}

static PyObject *py_sq_norms(PyObject *module, PyObject *arguments) {
    int dtype, own;
    PyObject *base, *addresses;
    Py_ssize_t n;
    const void **tuned;
    double *sums;
    if (!PyArg_ParseTuple(arguments, "iOOnp", &dtype, &base, &addresses, &n, &own))
        return NULL;
    const void *reference = PyLong_AsVoidPtr(base);
    if (PyErr_Occurred() || !take(dtype, n, addresses, &tuned, &sums)) return NULL;
    Py_ssize_t count = PyTuple_Size(addresses);
    Py_BEGIN_ALLOW_THREADS;
    LOOPS[dtype].sq_norms(reference, tuned, (size_t)count, (size_t)n, own,
                          sums);
    Py_END_ALLOW_THREADS;
    PyObject *list = list_of(sums, count + (own != 0));
    PyMem_Free(tuned);
    return list;
}

static PyObject *py_gram(PyObject *module, PyObject *arguments) {
    int dtype;
    PyObject *base, *addresses, *list = NULL;
    Py_ssize_t n;
    const void **tuned;
    double *unused;
    if (!PyArg_ParseTuple(arguments, "iOOn", &dtype, &base, &addresses, &n)) return NULL;
    const void *reference = PyLong_AsVoidPtr(base);
    if (PyErr_Occurred() || !take(dtype, n, addresses, &tuned, &unused)) return NULL;
    size_t count = (size_t)PyTuple_Size(addresses);
    /* Vectors that cross a cache line take longer to load. */
    void *room = PyMem_Malloc(count * (BLOCK + count) * sizeof(double) + LINE);
    if (!room) {
        PyErr_NoMemory();
    } else {
        double *taus = (double *)(((uintptr_t)room + LINE - 1) / LINE * LINE);
        double *gram = taus + count * BLOCK;
        for (size_t at = 0; at < count * count; at++) gram[at] = 0;
        Py_BEGIN_ALLOW_THREADS;
        LOOPS[dtype].gram(reference, tuned, count, (size_t)n, taus, gram);
        Py_END_ALLOW_THREADS;
        for (size_t k = 0; k < count; k++)
            for (size_t l = k + 1; l < count; l++)
                gram[k * count + l] = gram[l * count + k];
        list = list_of(gram, (Py_ssize_t)(count * count));
        PyMem_Free(room);
    }
    PyMem_Free(tuned);
    return list;
}

static PyObject *py_scaled_sum(PyObject *module, PyObject *arguments) {
    int dtype, narrow, finite = 0;
    PyObject *base, *addresses, *scales, *merged;
    Py_ssize_t n;
    const void **tuned;
    double *factors;
    if (!PyArg_ParseTuple(arguments, "iOOOnpO", &dtype, &base, &addresses, &scales, &n,
                          &narrow, &merged))
        return NULL;
    const void *reference = base == Py_None ? NULL : PyLong_AsVoidPtr(base);
    void *out = PyLong_AsVoidPtr(merged);
    if (PyErr_Occurred() || !take(dtype, n, addresses, &tuned, &factors)) return NULL;
    Py_ssize_t count = PyTuple_Size(addresses);
    if (PyTuple_Size(scales) != count || (!reference && n && !count))
        PyErr_SetString(PyExc_ValueError, "a factor for each model, and a summand");
    for (Py_ssize_t k = 0; k < count && !PyErr_Occurred(); k++)
        factors[k] = PyFloat_AsDouble(PyTuple_GetItem(scales, k));
    if (!PyErr_Occurred()) {
        Py_BEGIN_ALLOW_THREADS;
        finite = LOOPS[dtype].scaled_sum(reference, tuned, factors, (size_t)count,
                                         (size_t)n, narrow, out);
        Py_END_ALLOW_THREADS;
    }
    PyMem_Free(tuned);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(finite);
}

static PyMethodDef METHODS[] = {
    {"sq_norms", py_sq_norms, METH_VARARGS,
     "sq_norms(dtype, base, tuned, n) -> list of ||tuned[k] - base||^2"},
    {"gram", py_gram, METH_VARARGS,
     "gram(dtype, base, tuned, n) -> list of <tuned[k] - base, tuned[l] - base>"},
    {"scaled_sum", py_scaled_sum, METH_VARARGS,
     "scaled_sum(dtype, base or None, tuned, factors, n, narrow, out) -> all finite"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_mergekit_metagpt", "See compiled.py.", 0, METHODS,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__mergekit_metagpt(void) { return PyModule_Create(&MODULE); }
