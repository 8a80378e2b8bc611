// What kernels are written in, as the device has it: names for its threads and memory, and the instructions that CUDA C has no word for.
// `emulator.c` has the same names for the processor. Kernels are C and CUDA C++ at once: no templates, no overloads, no headers.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef int i32;

#define DEVICE static __device__ __forceinline__
#define ALIGNED(bytes) __attribute__((aligned(bytes)))
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define INFINITE __int_as_float(0x7f800000)

// An entry point. Its one parameter is a structure of fields of eight bytes, `args`.
#define KERNEL(name, Arguments, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Arguments args)

#define THREAD (threadIdx.x)
#define THREADS (blockDim.x)
#define BLOCK_X (blockIdx.x)
#define BLOCK_Y (blockIdx.y)
#define BLOCK_Z (blockIdx.z)
#define GRID_X (gridDim.x)
#define GRID_Y (gridDim.y)

// The block's shared memory, all of it dynamic: what a launch says.
#define SHARED(name) extern __shared__ __align__(128) u8 name[]

DEVICE u32 float_bits(float value) { return __float_as_uint(value); }
DEVICE float bits_float(u32 bits) { return __uint_as_float(bits); }

// Waits for all threads of the block.
#define barrier() __syncthreads()
// Waits for all lanes of the warp.
#define warp_barrier() __syncwarp()

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE u32 shuffle_xor_bits(u32 value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// 2^value, relative error below 2^-22; 0 for -infinity.
DEVICE float power2(float value) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
    return power;
}

DEVICE u16 bf16_from(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Two bf16, the first in the low half.
DEVICE u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// a * b + c of two bf16, each rounded once.
DEVICE u32 bf16_pair_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

DEVICE u32 f16_pair_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Of the eight bytes of `a` and then `b`, the four that the nibbles of `which` name, the lowest first.
DEVICE u32 pick_bytes(u32 a, u32 b, u32 which) { return __byte_perm(a, b, which); }

DEVICE u16 f16_from(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

DEVICE float f16_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Sixteen bytes.
typedef struct ALIGNED(16) { u32 word[4]; } quad;

// Sixteen bytes that are read once: weights. They pass the first-level cache by.
DEVICE quad load_once(const void *from) {
    quad q;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.word[0]), "=r"(q.word[1]), "=r"(q.word[2]), "=r"(q.word[3]) : "l"(from));
    return q;
}

// d += a * b, `mma.sync.aligned.m16n8k16` (PTX ISA, warp-level matrix instructions). With g = lane / 4 and q = lane % 4 a lane holds
//   a: rows g, g + 8 of k 2q, 2q + 1, then the same of k 2q + 8, 2q + 9;   b: k 2q, 2q + 1, then 2q + 8, 2q + 9 of column g;
//   d: columns 2q, 2q + 1 of row g, then of row g + 8.
DEVICE void mma_bf16(float *d, const u32 *a, const u32 *b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void mma_f16(float *d, const u32 *a, const u32 *b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE u32 shared_address(const void *at) { return (u32)__cvta_generic_to_shared(at); }

// Four 8 x 8 matrices of 16-bit elements, transposed: lane l gives the row l % 8 of matrix l / 8 and gets, of each matrix, column
// l / 4 in rows 2 (l % 4) and 2 (l % 4) + 1 (PTX ISA, ldmatrix).
DEVICE void load_transposed(u32 *to, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

// The same without transposing: lane l gets, of each matrix, row l / 4 in columns 2 (l % 4) and 2 (l % 4) + 1.
DEVICE void load_matrices(u32 *to, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

// Copies sixteen bytes from global to shared memory in the background; zeros where `valid` is not.
DEVICE void copy_async(void *to, const void *from, int valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// As `copy_async`, eight bytes.
DEVICE void copy_async_8(void *to, const void *from, int valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(valid ? 8 : 0) : "memory");
}

// Closes a group of copies.
DEVICE void copy_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `left` of this thread's latest groups are under way; `left` is a constant.
#define copy_wait(left) asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory")

// Adds and returns what was there before; all threads of the grid see it.
DEVICE u32 count_up(u32 *counter) {
    __threadfence();
    return atomicAdd(counter, 1);
}
// What other blocks wrote before they counted up is seen by what follows.
DEVICE void see_others(void) { __threadfence(); }

// Adds in shared memory; threads of the block may do so at once.
DEVICE void add_shared(u32 *to, u32 value) { atomicAdd(to, value); }
