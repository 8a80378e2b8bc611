// The first factor of adapters: `scale * A x`, for the rows of a linear that have a delta.
//
// A block belongs to a row. It looks at the sixteen rows of its tile, and if it is the first of them with its delta multiplies them all by that delta's `A`, sixteen
// ranks at a time, and keeps the rows whose delta it is; else it leaves at once. So `A` is read once for a tile, whichever rows share an adapter.
//
// The inputs are cut into eight runs of whole steps of 32, one for each warp. Within a run the products follow each other in one chain of `mma`, and
// runs are added from first to last, so a row's numbers depend on the row alone. Lanes read as in `linear.cu`: inputs 8 q .. 8 q + 7 of a step, of rows
// g and g + 8 and of ranks g and g + 8.

enum { SHRINK_WARPS = 8, SHRINK_ROWS = 16, SHRINK_RANKS = 16, SHRINK_STEPS = 4 };

typedef struct {
    FIELD(const u16 *, input);        // [rows][input_stride] 16-bit floats, numbers up to a whole step
    FIELD(const Adapted *, adapted);
    FIELD(u32, rows);
    FIELD(u32, input_stride);         // elements, a multiple of 8
    FIELD(u32, steps);
    FIELD(u32, place);                // which of a layer's deltas
} ShrinkArguments;

// Blocks along x are rows; those along y take turns at the ranks.
KERNEL(shrink, ShrinkArguments, SHRINK_WARPS * WARP, 2) {
    SHARED(room);
    u32 lane = THREAD % WARP, warp = THREAD / WARP, g = lane / 4, q = lane % 4;
    u32 first = BLOCK_X / SHRINK_ROWS * SHRINK_ROWS, last = first + SHRINK_ROWS < args.rows ? first + SHRINK_ROWS : args.rows;
    const Delta *delta = delta_of(args.adapted, BLOCK_X, args.place);
    const u16 *inputs[2];
    float *left = (float *)room;
    u32 row, rank, step, start = args.steps * warp / SHRINK_WARPS, end = args.steps * (warp + 1) / SHRINK_WARPS;
    int at, half, k;
    if (!delta) return;
    for (row = first; row < BLOCK_X; row++)
        if (delta_of(args.adapted, row, args.place) == delta) return;
    UNROLL for (at = 0; at < 2; at++) {
        row = first + g + 8 * at;
        inputs[at] = row < last ? args.input + (u64)row * args.input_stride + 8 * q : 0;
    }
    ROLLED for (rank = BLOCK_Y * SHRINK_RANKS; rank < delta->ranks; rank += GRID_Y * SHRINK_RANKS) {
        const u16 *down = delta->down + (u64)(rank + g) * args.steps * 32 + 8 * q;
        float sums[2][4];
        UNROLL for (at = 0; at < 8; at++) sums[at / 4][at % 4] = 0.0f;
        ROLLED for (step = start; step < end; step += SHRINK_STEPS) {
            quad a[SHRINK_STEPS][2], b[SHRINK_STEPS][2], none = {{0, 0, 0, 0}};
            UNROLL for (at = 0; at < SHRINK_STEPS; at++) {
                if (step + at >= end) break;
                UNROLL for (half = 0; half < 2; half++) {
                    a[at][half] = inputs[half] ? *(const quad *)(inputs[half] + (step + at) * 32) : none;
                    b[at][half] = load_once(down + ((u64)half * 8 * args.steps + step + at) * 32);
                }
            }
            UNROLL for (at = 0; at < SHRINK_STEPS; at++) {
                if (step + at >= end) break;
                UNROLL for (k = 0; k < 2; k++) {
                    u32 rows[4] = {a[at][0].word[2 * k], a[at][1].word[2 * k], a[at][0].word[2 * k + 1], a[at][1].word[2 * k + 1]};
                    UNROLL for (half = 0; half < 2; half++) mma(sums[half], rows, b[at][half].word + 2 * k);
                }
            }
        }
        // [warps][rows][ranks], of which a thread adds one of each warp.
        UNROLL for (half = 0; half < 2; half++)
            UNROLL for (at = 0; at < 4; at++)
                left[(warp * SHRINK_ROWS + at / 2 * 8 + g) * SHRINK_RANKS + half * 8 + 2 * q + at % 2] = sums[half][at];
        barrier();
        row = first + THREAD / SHRINK_RANKS;
        if (row < last && delta_of(args.adapted, row, args.place) == delta) {
            u32 own = rank + THREAD % SHRINK_RANKS;
            float total = left[THREAD];
            for (at = 1; at < SHRINK_WARPS; at++) total += left[at * SHRINK_ROWS * SHRINK_RANKS + THREAD];
            args.adapted->hidden[(u64)row * args.adapted->stride + own] = total * delta->scales[own];
        }
        barrier();
    }
}
