// What adapters add to a linear (LoRA, arXiv 2106.09685): `y += B (scale * A x)`, each row with its own.
//
// `shrink.cu` computes `scale * A x` of the rows that have a delta, a few f32 each; whatever ends a linear's sums multiplies them by `B` and adds that, behind
// the bias. An output's delta is one sum along the ranks, from first to last. A row without a delta is not touched, so its bits are those of a step
// without adapters.

// The delta of a linear. Half a panel, 32 outputs, has the ranks that these outputs use.
typedef struct {
    FIELD(const u16 *, down);      // A: [ranks][32 steps] 16-bit floats
    FIELD(const float *, scales);  // [ranks]
    FIELD(const u16 *, up);        // B: for each half panel [its ranks][32]
    FIELD(const u32 *, halves);    // for each: its first rank, how many it has, and where they begin in `up`, in elements
    FIELD(u32, ranks);             // of all halves, a multiple of 16; 0 = no delta
} Delta;

// What rows have adapters; behind it [rows] addresses of their deltas, [layers][4] of each adapter, null for rows without.
typedef struct {
    FIELD(float *, hidden);        // [rows][stride]: scale * A x
    FIELD(u32, stride);
} Adapted;

// The delta of a row at `place`, or null.
DEVICE const Delta *delta_of(const Adapted *adapted, u32 row, u32 place) {
    const Delta *deltas = ((const Delta *const *)(adapted + 1))[row];
    return deltas && deltas[place].ranks ? deltas + place : 0;
}

// Adds a row's delta to eight neighbouring outputs, from `column` on. Four ranks are on their way at a time.
DEVICE void add_delta(const Adapted *adapted, u32 place, u32 row, u32 column, float *sums) {
    const Delta *delta = delta_of(adapted, row, place);
    float totals[8];
    u32 rank;
    int at, i;
    if (!delta) return;
    const u32 *half = delta->halves + column / 32 * 3;
    const float *hidden = adapted->hidden + (u64)row * adapted->stride + half[0];
    const u16 *up = delta->up + half[2] + column % 32;
    u32 ranks = half[1];
    UNROLL for (i = 0; i < 8; i++) totals[i] = 0.0f;
    ROLLED for (rank = 0; rank < ranks; rank += 4) {
        quad factors[4];
        float by[4];
        UNROLL for (at = 0; at < 4; at++) {
            u32 own = rank + at < ranks ? rank + at : rank;
            factors[at] = *(const quad *)(up + own * 32);
            by[at] = hidden[own];
        }
        UNROLL for (at = 0; at < 4; at++) {
            if (rank + at >= ranks) break;
            UNROLL for (i = 0; i < 8; i++) totals[i] = fmaf(by[at], wide((u16)(factors[at].word[i / 2] >> i % 2 * 16)), totals[i]);
        }
    }
    UNROLL for (i = 0; i < 8; i++) sums[i] += totals[i];
}
