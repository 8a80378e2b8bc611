// Copies of pages between memory that the card reaches: its own, and that of its peers. A block moves one run.

enum { COPY_THREADS = 256, COPY_BYTES = COPY_THREADS * 16, COPY_DEPTH = 4 };

typedef struct {
    FIELD(const u64 *, runs); // [grid][3]: from where, to where, bytes
} CopyArguments;

KERNEL(copy_runs, CopyArguments, COPY_THREADS, 4) {
    const u64 *run = args.runs + (u64)BLOCK_X * 3;
    const u8 *from = (const u8 *)run[0];
    u8 *to = (u8 *)run[1];
    u64 bytes = run[2], at;
    int depth;
    if ((run[0] | run[1] | bytes) % 16) {
        for (at = THREAD; at < bytes; at += COPY_THREADS) to[at] = from[at];
        return;
    }
    // Each thread has four loads under way: what comes from memory, or over a link, takes its time.
    for (at = THREAD * 16; at + (COPY_DEPTH - 1) * COPY_BYTES < bytes; at += COPY_DEPTH * COPY_BYTES) {
        quad part[COPY_DEPTH];
        UNROLL for (depth = 0; depth < COPY_DEPTH; depth++) part[depth] = *(const quad *)(from + at + depth * COPY_BYTES);
        UNROLL for (depth = 0; depth < COPY_DEPTH; depth++) *(quad *)(to + at + depth * COPY_BYTES) = part[depth];
    }
    for (; at < bytes; at += COPY_BYTES) *(quad *)(to + at) = *(const quad *)(from + at);
}
