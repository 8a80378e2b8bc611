// Where keys and values lie (kv-cache/src/layout.rs): a block holds a page of a layer, keys `[kv_heads][page_tokens][dim]`, then values
// likewise, then, where elements are bytes, a bf16 scale for each token and head of keys and of values.
// Keys of latents (engine/src/model/latent.rs) are values as well: one head, and none of the second.
// PAGES says what elements are: 0 16-bit floats, 1 e4m3 times a scale, 2 integers times a scale.

typedef struct {
    FIELD(u8 *, layer);         // block of page 0
    FIELD(u64, block_bytes);
    FIELD(u32, values);         // bytes from a block's start
    FIELD(u32, key_scales);
    FIELD(u32, value_scales);
    FIELD(u32, page_shift);     // a page has 2^page_shift tokens
    FIELD(u32, kv_heads);
    FIELD(u32, dim);            // elements of a head, a multiple of 4
} Pages;

#if PAGES
enum { ELEMENT_BYTES = 1 };
#else
enum { ELEMENT_BYTES = 2 };
#endif

// Which of a block's tokens and heads.
DEVICE u32 place(const Pages *pages, u32 head, u32 token) { return (head << pages->page_shift) + token; }

DEVICE u8 *block_of(const Pages *pages, u32 page) { return pages->layer + (u64)page * pages->block_bytes; }

DEVICE u8 byte_from(float value) { return PAGES == 1 ? e4m3_from(value) : int8_from(value); }

// Writes a head, which a warp holds, to its place in a page; `plane` and `scales` are bytes from the block's start.
DEVICE void write_head(const Pages *pages, const u32 *slot, u32 head, const float *values, u32 plane, u32 scales) {
    u32 dim = pages->dim, lane = THREAD % WARP, at, where = place(pages, head, slot[1]);
    u8 *block = block_of(pages, slot[0]), *to = block + plane + (u64)where * dim * ELEMENT_BYTES;
#if PAGES
    u32 magnitude = 0, other;
    int mask;
    float scale;
    for (at = lane; at < dim; at += WARP) {
        other = float_bits(values[at]) & 0x7fffffffu;
        magnitude = other > magnitude ? other : magnitude;
    }
    for (mask = 16; mask; mask /= 2) {
        other = shuffle_xor_bits(magnitude, mask);
        magnitude = other > magnitude ? other : magnitude;
    }
    if (magnitude >= 0x7f800000u) scale = bits_float(0x7fc00000u);
    else {
        // The smallest bf16 that brings the largest within range; never so small that it is not normal.
        scale = bits_float((float_bits(bits_float(magnitude) / (PAGES == 1 ? 448.0f : 127.0f)) + 0xffff) & 0xffff0000u);
        if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;
    }
    if (lane == 0) ((u16 *)(block + scales))[where] = (u16)(float_bits(scale) >> 16);
    for (at = lane; at < dim; at += WARP) to[at] = magnitude >= 0x7f800000u ? 0 : byte_from(values[at] / scale);
#else
    (void)scales;
    for (at = lane; at < dim; at += WARP) ((u16 *)to)[at] = narrow(values[at]);
#endif
}
