// Where keys and values lie (kv-cache/src/layout.rs): a block holds a page of a layer, keys `[kv_heads][page_tokens][dim]`, then values
// likewise, then, where elements are bytes, a bf16 scale for each token and head of keys and of values.
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
