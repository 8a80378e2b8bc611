// cuBLASLt as far as the engine calls it, for the cards of `libcuda.c`: products of matrices in columns, of which the first is transposed.
//
// As with the real one, a product is work of a stream: nothing happens when it is asked for. What the real one wants of layouts, types and addresses
// is checked here, and a way is good for what it was chosen for: for that shape, and, where it was chosen for a multiple of eight rows, for those alone.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long Address;
typedef struct Stream Stream;
typedef void Call(const uint64_t *);
enum { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum { F32 = 0, F16 = 2, I8 = 3, I32 = 10, BF16 = 14, E4M3 = 28, COMPUTE_F32 = 68, COMPUTE_I32 = 72 };
enum { HANDLE = 0x68, DESCRIPTION, LAYOUT, PREFERENCE, WORKSPACE_BYTES = 1 << 20 };

typedef struct { int kind; } Handle;
typedef struct { int kind, compute, scale, transposed; int8_t fast; } Description;
typedef struct { int kind, type; uint64_t rows, columns; int64_t stride; } Layout;
typedef struct { int kind; uint64_t workspace; } Preference;
typedef struct { uint64_t data[8]; } Algorithm;
typedef struct { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; } Choice;

static int live, asked, multiplied, ignorant;
static size_t version = 130000;
static int (*queue_call)(Stream *, Call *, const uint64_t *, size_t, const Address *, const size_t *, int);

// What was neither destroyed nor given back, how often a way was asked for, and how often something was multiplied.
int objects(void) { return __atomic_load_n(&live, __ATOMIC_SEQ_CST); }
int choices(void) { return __atomic_load_n(&asked, __ATOMIC_SEQ_CST); }
int products(void) { return __atomic_load_n(&multiplied, __ATOMIC_SEQ_CST); }

// From here on it is of another version, or knows no way.
int grow_old(void) { version = 12103; return 0; }
int grow_up(void) { version = 120000; return 0; }
int forget(void) { ignorant = 1; return 0; }
int remember(void) { ignorant = 0; return 0; }

size_t cublasLtGetVersion(void) { return version; }
const char *cublasLtGetStatusString(int code) {
    return code == NOT_INITIALIZED ? "not initialized" : code == INVALID_VALUE ? "invalid value" : code == NOT_SUPPORTED ? "not supported" : "an error";
}

static void *make(int kind, size_t bytes) {
    int *made = calloc(1, bytes);
    *made = kind;
    __atomic_add_fetch(&live, 1, __ATOMIC_SEQ_CST);
    return made;
}

static int give_back(int kind, void *made) {
    if (!made || *(int *)made != kind) return INVALID_VALUE;
    *(int *)made = 0;
    free(made);
    __atomic_sub_fetch(&live, 1, __ATOMIC_SEQ_CST);
    return SUCCESS;
}

int cublasLtCreate(Handle **handle) {
    void *driver = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    if (!driver) return NOT_INITIALIZED;
    *(void **)&queue_call = dlsym(driver, "queue_call");
    int (*in_context)(void);
    *(void **)&in_context = dlsym(driver, "in_context");
    if (!queue_call || !in_context || !in_context()) return NOT_INITIALIZED;
    *handle = make(HANDLE, sizeof(Handle));
    return SUCCESS;
}
int cublasLtDestroy(Handle *handle) { return give_back(HANDLE, handle); }

int cublasLtMatmulDescCreate(Description **description, int compute, int scale) {
    *description = make(DESCRIPTION, sizeof(Description));
    (*description)->compute = compute;
    (*description)->scale = scale;
    return SUCCESS;
}
int cublasLtMatmulDescDestroy(Description *description) { return give_back(DESCRIPTION, description); }
int cublasLtMatmulDescSetAttribute(Description *description, int attribute, const void *value, size_t bytes) {
    if (description->kind != DESCRIPTION) return INVALID_VALUE;
    switch (attribute) {
    case 3: if (bytes != 4) return INVALID_VALUE; memcpy(&description->transposed, value, 4); return SUCCESS;
    case 25: if (bytes != 1) return INVALID_VALUE; memcpy(&description->fast, value, 1); return SUCCESS;
    default: return INVALID_VALUE;
    }
}

int cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    *layout = make(LAYOUT, sizeof(Layout));
    **layout = (Layout){LAYOUT, type, rows, columns, stride};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(Layout *layout) { return give_back(LAYOUT, layout); }
int cublasLtMatrixLayoutSetAttribute(Layout *layout, int attribute, const void *value, size_t bytes) {
    if (layout->kind != LAYOUT || attribute != 3 || bytes != 8) return INVALID_VALUE;
    memcpy(&layout->columns, value, 8);
    return SUCCESS;
}

int cublasLtMatmulPreferenceCreate(Preference **preference) { *preference = make(PREFERENCE, sizeof(Preference)); return SUCCESS; }
int cublasLtMatmulPreferenceDestroy(Preference *preference) { return give_back(PREFERENCE, preference); }
int cublasLtMatmulPreferenceSetAttribute(Preference *preference, int attribute, const void *value, size_t bytes) {
    if (preference->kind != PREFERENCE || attribute != 1 || bytes != 8) return INVALID_VALUE;
    memcpy(&preference->workspace, value, 8);
    return SUCCESS;
}

// Whether there can be such a product.
static int fits(const Handle *handle, const Description *description, const Layout *a, const Layout *b, const Layout *c, const Layout *d) {
    if (handle->kind != HANDLE || description->kind != DESCRIPTION || a->kind != LAYOUT || b->kind != LAYOUT || c->kind != LAYOUT || d->kind != LAYOUT) return 0;
    int integers = a->type == I8, narrow = a->type == I8 || a->type == E4M3;
    if (!narrow && a->type != BF16) return 0;
    if (description->compute != (integers ? COMPUTE_I32 : COMPUTE_F32) || description->scale != (integers ? I32 : F32)) return 0;
    if (description->fast && a->type != E4M3) return 0;
    // Weights are transposed, and narrow ones can be nothing else.
    if (description->transposed != 1 || b->type != a->type || c->type != d->type || d->type != description->scale) return 0;
    if (a->rows != b->rows || a->columns != d->rows || b->columns != d->columns || c->rows != d->rows || c->columns != d->columns) return 0;
    if (a->stride < (int64_t)a->rows || b->stride < (int64_t)b->rows || d->stride < (int64_t)d->rows || c->stride != d->stride) return 0;
    // Sixteen bytes.
    return a->stride % 16 == 0 && b->stride % 16 == 0 && d->stride % 4 == 0 && a->rows % 16 == 0 && d->rows % 16 == 0 && d->columns;
}

int cublasLtMatmulAlgoGetHeuristic(const Handle *handle, const Description *description, const Layout *a, const Layout *b, const Layout *c, const Layout *d,
                                   const Preference *preference, int room, Choice *choices, int *count) {
    *count = 0;
    if (preference->kind != PREFERENCE || room < 1 || preference->workspace < WORKSPACE_BYTES) return INVALID_VALUE;
    __atomic_add_fetch(&asked, 1, __ATOMIC_SEQ_CST);
    if (ignorant || !fits(handle, description, a, b, c, d)) return NOT_SUPPORTED;
    *count = 1;
    memset(choices, 0, sizeof *choices);
    Algorithm algorithm = {{0x616c676f, a->type, a->rows, a->columns, b->stride, d->stride, d->columns % 8 == 0}};
    choices->algorithm = algorithm;
    choices->workspace = WORKSPACE_BYTES;
    return SUCCESS;
}

static float wide(int type, const void *from, uint64_t at) {
    if (type == I8) return ((const int8_t *)from)[at];
    if (type == BF16) {
        uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    uint8_t bits = ((const uint8_t *)from)[at];
    int exponent = bits >> 3 & 15, fraction = bits & 7;
    float value = exponent ? ldexpf(8 + fraction, exponent - 10) : ldexpf(fraction, -9);
    return (bits & 0x7f) == 0x7f ? NAN : bits & 0x80 ? -value : value;
}

static void multiply(const uint64_t *args) {
    const void *a = (const void *)args[0], *b = (const void *)args[1];
    float *to = (float *)args[2];
    uint64_t type = args[3], inputs = args[4], outputs = args[5], rows = args[6], b_stride = args[7], to_stride = args[8], adds = args[9];
    float *weights = malloc(outputs * inputs * sizeof(float)), *input = malloc(inputs * sizeof(float));
    for (uint64_t output = 0; output < outputs; output++)
        for (uint64_t at = 0; at < inputs; at++) weights[output * inputs + at] = wide(type, a, output * args[10] + at);
    for (uint64_t row = 0; row < rows; row++) {
        for (uint64_t at = 0; at < inputs; at++) input[at] = wide(type, b, row * b_stride + at);
        for (uint64_t output = 0; output < outputs; output++) {
            double sum = 0;
            for (uint64_t at = 0; at < inputs; at++) sum += (double)weights[output * inputs + at] * input[at];
            float *own = to + row * to_stride + output;
            if (type == I8) *(int32_t *)own = (int32_t)sum + (adds ? *(int32_t *)own : 0);
            else *own = (float)sum + (adds ? *own : 0);
        }
    }
    free(weights);
    free(input);
}

int cublasLtMatmul(const Handle *handle, const Description *description, const void *alpha, const void *a, const Layout *a_layout, const void *b,
                   const Layout *b_layout, const void *beta, const void *c, const Layout *c_layout, void *d, const Layout *d_layout,
                   const Algorithm *algorithm, void *workspace, size_t workspace_bytes, Stream *stream) {
    if (!fits(handle, description, a_layout, b_layout, c_layout, d_layout) || c != d || workspace_bytes < WORKSPACE_BYTES) return INVALID_VALUE;
    // What the default of a preference says of addresses.
    if (((Address)a | (Address)b | (Address)d | (Address)workspace) % 256) return INVALID_VALUE;
    uint64_t own[] = {0x616c676f, a_layout->type, a_layout->rows, a_layout->columns, b_layout->stride, d_layout->stride};
    if (memcmp(algorithm->data, own, sizeof own)) return INVALID_VALUE;
    if (algorithm->data[6] && d_layout->columns % 8) return NOT_SUPPORTED;
    float factors[2];
    for (int at = 0; at < 2; at++) {
        const void *factor = at ? beta : alpha;
        factors[at] = description->scale == I32 ? (float)*(const int32_t *)factor : *(const float *)factor;
    }
    if (factors[0] != 1 || (factors[1] != 0 && factors[1] != 1)) return INVALID_VALUE;
    int element = a_layout->type == BF16 ? 2 : 1;
    uint64_t args[] = {
        (Address)a, (Address)b, (Address)d, a_layout->type, a_layout->rows, a_layout->columns, b_layout->columns,
        b_layout->stride, d_layout->stride, factors[1] == 1, a_layout->stride,
    };
    Address starts[] = {(Address)a, (Address)b, (Address)d, (Address)workspace};
    size_t bytes[] = {
        ((a_layout->columns - 1) * a_layout->stride + a_layout->rows) * element, ((b_layout->columns - 1) * b_layout->stride + b_layout->rows) * element,
        ((d_layout->columns - 1) * d_layout->stride + d_layout->rows) * 4, workspace_bytes,
    };
    if (queue_call(stream, multiply, args, sizeof args / sizeof *args, starts, bytes, 4)) return EXECUTION_FAILED;
    __atomic_add_fetch(&multiplied, 1, __ATOMIC_SEQ_CST);
    return SUCCESS;
}
