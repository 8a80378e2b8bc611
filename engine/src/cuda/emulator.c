// What kernels are written in, as the processor has it: the names of `device.cu`, and what runs a grid.
//
// The threads of a block are fibers. A fiber runs until it meets others: at a barrier, or at an instruction of the whole warp, which is
// carried out when all 32 lanes have come to it. Lanes of a warp that meet at different places, and threads that leave while others wait,
// are errors. Shared memory starts as NaNs and ends at a page that cannot be touched.
//
// A grid is run in one of two orders, and what is right has the same result in both. FORWARD goes through blocks, warps and lanes
// upwards, and copies in the background happen at once; BACKWARD goes downwards, and they happen when they are waited for. So a missing
// barrier, or a buffer that is read too early or written too early, shows.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef int8_t i8;
typedef int32_t i32;

#define DEVICE static inline __attribute__((unused))
#define ALIGNED(bytes) __attribute__((aligned(bytes)))
#define UNROLL
#define ROLLED
#define INFINITE __builtin_inff()

enum { LANES = 32, MOST_THREADS = 1024, STACK = 128 << 10, MOST_COPIES = 1024, GUARD = 64 << 10, MOST_SHARED = 256 << 10 };
enum { READY, AT_WARP, AT_BARRIER, DONE };
enum { WARP_BARRIER, SHUFFLE_XOR, SHUFFLE, MMA_BF16, MMA_F16, LOAD_TRANSPOSED, LOAD_MATRICES };

// A copy in the background, or with no bytes the end of a group.
typedef struct { void *to; const void *from; int bytes, valid; } Copy;

typedef struct {
    void *stack_pointer;
    int state;
    // What it waits for, where, and its operands.
    int operation, line;
    void *operands;
    Copy copies[MOST_COPIES];
    int copy_count;
} Fiber;

typedef struct {
    u32 thread, threads, block[3], grid[3];
    u8 *shared;
    int backward;
    // The rest is the scheduler's.
    void *main_stack_pointer;
    void (*kernel)(const void *);
    const void *args;
    u8 *stacks, *shared_map;
    u64 shared_bytes;
    const char *problem_kind;
    int problem_line, problem_line_2;
    u32 problem_thread;
    Fiber fibers[MOST_THREADS];
} Machine;

static __thread Machine *emulated;

#define THREAD (emulated->thread)
#define THREADS (emulated->threads)
#define BLOCK_X (emulated->block[0])
#define BLOCK_Y (emulated->block[1])
#define BLOCK_Z (emulated->block[2])
#define GRID_X (emulated->grid[0])
#define GRID_Y (emulated->grid[1])
#define SHARED(name) u8 *const name = emulated->shared

#define KERNEL(name, Arguments, threads, blocks) \
    static void name##_body(Arguments args); \
    void name(const void *args) { name##_body(*(const Arguments *)args); } \
    static void name##_body(Arguments args)

// Saves what a function must keep, changes stacks, and takes up what was left there.
void emulator_switch(void **save, void *const *load) __attribute__((visibility("hidden")));
#if defined(__APPLE__)
#define SYMBOL "_emulator_switch"
#else
#define SYMBOL "emulator_switch"
#endif
#if defined(__x86_64__)
__asm__(".text\n.globl " SYMBOL "\n" SYMBOL ":\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\nmovq (%rsi), %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
enum { SAVED_WORDS = 6 };
#elif defined(__aarch64__)
__asm__(".text\n.globl " SYMBOL "\n" SYMBOL ":\n"
        "sub sp, sp, #160\n"
        "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\n"
        "stp x29, x30, [sp, #80]\nstp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
        "mov x9, sp\nstr x9, [x0]\nldr x9, [x1]\nmov sp, x9\n"
        "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\n"
        "ldp x29, x30, [sp, #80]\nldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
        "add sp, sp, #160\nret\n");
#else
#error "the emulator changes stacks on x86-64 and AArch64 only"
#endif

static void leave(int state) {
    Fiber *fiber = &emulated->fibers[emulated->thread];
    fiber->state = state;
    emulator_switch(&fiber->stack_pointer, &emulated->main_stack_pointer);
}

static __attribute__((noinline)) void meet(int state, int operation, int line, void *operands) {
    Fiber *fiber = &emulated->fibers[emulated->thread];
    fiber->operation = operation;
    fiber->line = line;
    fiber->operands = operands;
    leave(state);
}

static void begin_fiber(void) {
    emulated->kernel(emulated->args);
    leave(DONE);
    abort();
}

#define barrier() meet(AT_BARRIER, 0, __LINE__, 0)
#define warp_barrier() meet(AT_WARP, WARP_BARRIER, __LINE__, 0)

DEVICE u32 float_bits(float value) { u32 bits; memcpy(&bits, &value, 4); return bits; }
DEVICE float bits_float(u32 bits) { float value; memcpy(&value, &bits, 4); return value; }

typedef struct { u32 value, from, got; } Exchange;

static inline u32 exchange(int operation, u32 value, int with, int line) {
    Exchange operands = {value, (u32)with, 0};
    meet(AT_WARP, operation, line, &operands);
    return operands.got;
}

#define shuffle_xor(value, mask) bits_float(exchange(SHUFFLE_XOR, float_bits(value), mask, __LINE__))
#define shuffle_xor_bits(value, mask) exchange(SHUFFLE_XOR, value, mask, __LINE__)
#define shuffle(value, lane) bits_float(exchange(SHUFFLE, float_bits(value), lane, __LINE__))

DEVICE float power2(float value) { return exp2f(value); }

DEVICE float bf16_wide(u16 bits) { return bits_float((u32)bits << 16); }

DEVICE u16 bf16_from(float value) {
    u32 bits = float_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

DEVICE u32 bf16_pair(float low, float high) { return bf16_from(low) | (u32)bf16_from(high) << 16; }

DEVICE float f16_float(u16 bits) {
    u32 exponent = bits >> 10 & 31, fraction = bits & 1023, sign = (u32)(bits >> 15) << 31;
    if (exponent == 31) return bits_float(sign | 0x7f800000 | fraction << 13);
    float value = exponent ? bits_float((exponent + 112) << 23 | fraction << 13) : (float)fraction * 0x1p-24f;
    return sign ? -value : value;
}

DEVICE u16 f16_from(float value) {
    u32 bits = float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return (u16)(sign | 0x7c00);
    if (magnitude < 0x38800000) return (u16)(sign | (u32)rintf(bits_float(magnitude) * 0x1p24f));
    return (u16)(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13));
}

// Products of 16-bit floats are exact as double, and so are sums of the numbers that kernels make here.
DEVICE u32 bf16_pair_fma(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int at = 0; at < 32; at += 16) {
        double sum = (double)bf16_wide((u16)(a >> at)) * bf16_wide((u16)(b >> at)) + bf16_wide((u16)(c >> at));
        d |= (u32)bf16_from((float)sum) << at;
    }
    return d;
}

DEVICE u32 f16_pair_fma(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int at = 0; at < 32; at += 16) {
        double sum = (double)f16_float((u16)(a >> at)) * f16_float((u16)(b >> at)) + f16_float((u16)(c >> at));
        d |= (u32)f16_from((float)sum) << at;
    }
    return d;
}

DEVICE u32 pick_bytes(u32 a, u32 b, u32 which) {
    u64 bytes = (u64)b << 32 | a;
    u32 picked = 0;
    for (int at = 0; at < 4; at++) picked |= (u32)(bytes >> 8 * (which >> 4 * at & 7) & 0xff) << 8 * at;
    return picked;
}

typedef struct ALIGNED(16) { u32 word[4]; } quad;

DEVICE quad load_once(const void *from) { return *(const quad *)from; }

typedef struct { float *d; const u32 *a, *b; } Product;

static inline void product(int operation, float *d, const u32 *a, const u32 *b, int line) {
    Product operands = {d, a, b};
    meet(AT_WARP, operation, line, &operands);
}

#define mma_bf16(d, a, b) product(MMA_BF16, d, a, b, __LINE__)
#define mma_f16(d, a, b) product(MMA_F16, d, a, b, __LINE__)

typedef struct { u32 *to; const u16 *row; } Matrices;

static inline void matrices(int operation, u32 *to, const void *row, int line) {
    Matrices operands = {to, (const u16 *)row};
    meet(AT_WARP, operation, line, &operands);
}

#define load_transposed(to, row) matrices(LOAD_TRANSPOSED, to, row, __LINE__)
#define load_matrices(to, row) matrices(LOAD_MATRICES, to, row, __LINE__)

static void carry_out(const Copy *copy) {
    if (copy->valid) memcpy(copy->to, copy->from, (size_t)copy->bytes);
    else memset(copy->to, 0, (size_t)copy->bytes);
}

static void queue_copy(Copy copy) {
    Fiber *fiber = &emulated->fibers[emulated->thread];
    if (!emulated->backward) {
        if (copy.bytes) carry_out(&copy);
        return;
    }
    if (fiber->copy_count == MOST_COPIES) {
        fprintf(stderr, "emulator: more than %d copies under way in a thread\n", MOST_COPIES);
        abort();
    }
    fiber->copies[fiber->copy_count++] = copy;
}

DEVICE void copy_async(void *to, const void *from, int valid) { queue_copy((Copy){to, from, 16, valid}); }
DEVICE void copy_async_8(void *to, const void *from, int valid) { queue_copy((Copy){to, from, 8, valid}); }
DEVICE void copy_commit(void) { queue_copy((Copy){0, 0, 0, 0}); }

static inline void wait_copies(int left) {
    Fiber *fiber = &emulated->fibers[emulated->thread];
    int groups = 0, done = 0, at;
    for (at = 0; at < fiber->copy_count; at++) groups += fiber->copies[at].bytes == 0;
    for (; groups > left; done++) {
        if (fiber->copies[done].bytes) carry_out(&fiber->copies[done]);
        else groups--;
    }
    fiber->copy_count -= done;
    memmove(fiber->copies, fiber->copies + done, (size_t)fiber->copy_count * sizeof(Copy));
}

#define copy_wait(left) wait_copies(left)

DEVICE u32 count_up(u32 *counter) { return (*counter)++; }
DEVICE void see_others(void) {}
DEVICE void add_shared(u32 *to, u32 value) { *to += value; }

// ---- Instructions of a whole warp.

static void multiply(int half, Product **lanes) {
    double a[16][16], b[16][8], d[16][8];
    int lane, part;
    for (lane = 0; lane < LANES; lane++) {
        int g = lane / 4, q = lane % 4;
        for (part = 0; part < 8; part++) {
            u16 bits = (u16)(lanes[lane]->a[part / 2] >> part % 2 * 16);
            int row = g + part / 2 % 2 * 8, k = 2 * q + part % 2 + part / 4 * 8;
            a[row][k] = half ? f16_float(bits) : bf16_wide(bits);
        }
        for (part = 0; part < 4; part++) {
            u16 bits = (u16)(lanes[lane]->b[part / 2] >> part % 2 * 16);
            b[2 * q + part % 2 + part / 2 * 8][g] = half ? f16_float(bits) : bf16_wide(bits);
            d[g + part / 2 * 8][2 * q + part % 2] = lanes[lane]->d[part];
        }
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    for (lane = 0; lane < LANES; lane++)
        for (part = 0; part < 4; part++)
            lanes[lane]->d[part] = (float)d[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2];
}

static void operate(int operation, void **operands) {
    int lane, matrix;
    switch (operation) {
    case SHUFFLE_XOR:
    case SHUFFLE:
        for (lane = 0; lane < LANES; lane++) {
            Exchange *own = (Exchange *)operands[lane];
            u32 from = operation == SHUFFLE ? own->from : (u32)lane ^ own->from;
            own->got = ((Exchange *)operands[from % LANES])->value;
        }
        break;
    case MMA_BF16:
    case MMA_F16:
        multiply(operation == MMA_F16, (Product **)operands);
        break;
    case LOAD_TRANSPOSED:
        for (lane = 0; lane < LANES; lane++)
            for (matrix = 0; matrix < 4; matrix++) {
                const u16 *first = ((Matrices *)operands[matrix * 8 + lane % 4 * 2])->row;
                const u16 *second = ((Matrices *)operands[matrix * 8 + lane % 4 * 2 + 1])->row;
                ((Matrices *)operands[lane])->to[matrix] = first[lane / 4] | (u32)second[lane / 4] << 16;
            }
        break;
    case LOAD_MATRICES:
        for (lane = 0; lane < LANES; lane++)
            for (matrix = 0; matrix < 4; matrix++) {
                const u16 *row = ((Matrices *)operands[matrix * 8 + lane / 4])->row + lane % 4 * 2;
                ((Matrices *)operands[lane])->to[matrix] = row[0] | (u32)row[1] << 16;
            }
        break;
    }
}

// ---- The scheduler.

static int fail(Machine *machine, const char *kind, u32 thread, int line, int other) {
    machine->problem_kind = kind;
    machine->problem_thread = thread;
    machine->problem_line = line;
    machine->problem_line_2 = other;
    return 0;
}

// Runs a warp until all its lanes are done or at a barrier.
static int run_warp(Machine *machine, u32 first) {
    for (;;) {
        void *operands[LANES];
        Fiber *fibers = &machine->fibers[first];
        for (u32 step = 0; step < LANES; step++) {
            u32 lane = machine->backward ? LANES - 1 - step : step;
            if (fibers[lane].state != READY) continue;
            machine->thread = first + lane;
            emulator_switch(&machine->main_stack_pointer, &fibers[lane].stack_pointer);
            operands[lane] = fibers[lane].operands;
        }
        int state = fibers[0].state;
        for (u32 lane = 1; lane < LANES; lane++) {
            if (fibers[lane].state != state)
                return fail(machine, "lanes of a warp part", first + lane, fibers[lane].line, fibers[0].line);
            if (state != DONE && (fibers[lane].line != fibers[0].line || fibers[lane].operation != fibers[0].operation))
                return fail(machine, "lanes of a warp meet at different places", first + lane, fibers[lane].line, fibers[0].line);
        }
        if (state != AT_WARP) return 1;
        operate(fibers[0].operation, operands);
        for (u32 lane = 0; lane < LANES; lane++) fibers[lane].state = READY;
    }
}

static int run_block(Machine *machine) {
    u32 warps = machine->threads / LANES;
    memset(machine->shared, 0xff, machine->shared_bytes);
    for (u32 thread = 0; thread < machine->threads; thread++) {
        Fiber *fiber = &machine->fibers[thread];
        fiber->state = READY;
        fiber->copy_count = 0;
        u64 *top = (u64 *)(machine->stacks + (u64)(thread + 1) * STACK);
#if defined(__x86_64__)
        // As after a call: the stack pointer is eight off a multiple of sixteen.
        top -= 2;
        *top = (u64)(uintptr_t)begin_fiber;
        top -= SAVED_WORDS;
#else
        top -= 20;
        memset(top, 0, 160);
        top[11] = (u64)(uintptr_t)begin_fiber;
#endif
        fiber->stack_pointer = top;
    }
    for (;;) {
        for (u32 step = 0; step < warps; step++) {
            u32 warp = machine->backward ? warps - 1 - step : step;
            if (!run_warp(machine, warp * LANES)) return 0;
        }
        int state = machine->fibers[0].state;
        for (u32 thread = 0; thread < machine->threads; thread += LANES) {
            Fiber *fiber = &machine->fibers[thread];
            if (fiber->state != state || (state != DONE && fiber->line != machine->fibers[0].line))
                return fail(machine, "warps of a block meet at different places", thread, fiber->line, machine->fibers[0].line);
        }
        for (u32 thread = 0; thread < machine->threads; thread++) {
            if (state == DONE && machine->fibers[thread].copy_count && machine->fibers[thread].copies[0].bytes)
                return fail(machine, "a thread left before its copies were waited for", thread, 0, 0);
            machine->fibers[thread].state = READY;
        }
        if (state == DONE) return 1;
    }
}

static Machine *make_machine(void) {
    Machine *machine = (Machine *)calloc(1, sizeof(Machine));
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    machine->stacks = (u8 *)mmap(0, (size_t)MOST_THREADS * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
    machine->shared_map = (u8 *)mmap(0, MOST_SHARED + GUARD, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (machine->stacks == MAP_FAILED || machine->shared_map == MAP_FAILED) abort();
    mprotect(machine->shared_map + MOST_SHARED, GUARD, PROT_NONE);
    return machine;
}

// Runs a grid; returns 0, or 1 and says in `problem` what is wrong.
int emulator_run(void (*kernel)(const void *), const void *args, const u32 *grid, u32 threads, u64 shared_bytes, int backward, char *problem,
                 u64 room) {
    if (threads == 0 || threads % LANES || threads > MOST_THREADS || shared_bytes > MOST_SHARED) {
        snprintf(problem, room, "a block of %u threads with %llu bytes of shared memory", threads, shared_bytes);
        return 1;
    }
    if (!emulated) emulated = make_machine();
    Machine *machine = emulated;
    machine->kernel = kernel;
    machine->args = args;
    machine->threads = threads;
    machine->backward = backward;
    machine->shared_bytes = shared_bytes = (shared_bytes + 127) / 128 * 128;
    machine->shared = machine->shared_map + MOST_SHARED - shared_bytes;
    memcpy(machine->grid, grid, sizeof machine->grid);
    u64 blocks = (u64)grid[0] * grid[1] * grid[2];
    for (u64 step = 0; step < blocks; step++) {
        u64 block = backward ? blocks - 1 - step : step;
        machine->block[0] = (u32)(block % grid[0]);
        machine->block[1] = (u32)(block / grid[0] % grid[1]);
        machine->block[2] = (u32)(block / grid[0] / grid[1]);
        if (!run_block(machine)) {
            snprintf(problem, room, "block (%u, %u, %u): %s: thread %u at line %d, the first at line %d", machine->block[0], machine->block[1],
                     machine->block[2], machine->problem_kind, machine->problem_thread, machine->problem_line, machine->problem_line_2);
            return 1;
        }
    }
    return 0;
}
