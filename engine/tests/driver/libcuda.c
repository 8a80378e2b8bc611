// NVIDIA's driver as far as the engine calls it, on the processor: one card, whose machine code is a shared library made by `libnvrtc.c`.
//
// It is stricter than the real one. What is asynchronous is put off until somebody waits for it, so memory that is used again too early
// shows; a thread without a current context, copies beyond an allocation, and what a stream that captures forbids are errors; and what was not
// given back when the context goes is counted (`leaks`).

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long long Address;
typedef int Result;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_FOUND = 500, LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900 };

enum { COPY, SET, RUN, RECORD, AWAIT };

typedef struct Module { void *library; int (*run)(const void *, const void *, const unsigned *, unsigned, Address, int, char *, Address); } Module;
typedef struct Function { Module *module; const void *entry; int shared_bytes; struct Function *next; } Function;
typedef struct Event Event;

typedef struct {
    int kind;
    void *to;
    const void *from;
    size_t bytes;
    unsigned char value;
    Event *event;
    int number;
    Function *function;
    unsigned grid[3], threads, shared_bytes;
    uint64_t args[32];
} Operation;

typedef struct { Operation *all; size_t count, done, room; } Queue;
typedef struct { Queue queue; int captures; Queue captured; } Stream;
struct Event { Stream *stream; int number, passed; };
typedef struct { Queue calls; } Graph;

static struct { Address start; size_t bytes; } allocated[65536];
static int allocations, live, current_contexts;
static size_t taken;
static const size_t TOTAL = (size_t)4 << 30;
static __thread int current;
static char problem[512];

// What is alive that the context should have taken with it.
int leaks(void) { return live; }

static Operation *push(Queue *queue) {
    if (queue->count == queue->room) {
        queue->room = queue->room ? 2 * queue->room : 64;
        queue->all = realloc(queue->all, queue->room * sizeof(Operation));
    }
    memset(&queue->all[queue->count], 0, sizeof(Operation));
    return &queue->all[queue->count++];
}

static int holds(Address start, size_t bytes) {
    for (int at = 0; at < allocations; at++)
        if (start >= allocated[at].start && start + bytes <= allocated[at].start + allocated[at].bytes) return 1;
    return 0;
}

static Result run_until(Stream *stream, size_t end);

static Result run_one(const Operation *operation) {
    switch (operation->kind) {
    case COPY: memcpy(operation->to, operation->from, operation->bytes); break;
    case SET: memset(operation->to, operation->value, operation->bytes); break;
    case RECORD: operation->event->passed = operation->number; break;
    case AWAIT: {
        // Another stream's work up to the event.
        Stream *other = operation->event->stream;
        while (other && operation->event->passed < operation->number && other->queue.done < other->queue.count) {
            Result result = run_until(other, other->queue.done + 1);
            if (result) return result;
        }
        break;
    }
    case RUN:
        if (operation->function->module->run(operation->function->entry, operation->args, operation->grid, operation->threads,
                                             operation->shared_bytes, 0, problem, sizeof problem)) {
            fprintf(stderr, "libcuda: %s\n", problem);
            return LAUNCH_FAILED;
        }
        break;
    }
    return SUCCESS;
}

static Result run_until(Stream *stream, size_t end) {
    while (stream->queue.done < end) {
        Operation operation = stream->queue.all[stream->queue.done++];
        Result result = run_one(&operation);
        if (result) return result;
    }
    if (stream->queue.done == stream->queue.count) stream->queue.done = stream->queue.count = 0;
    return SUCCESS;
}

#define IN_CONTEXT if (!current || !current_contexts) return INVALID_CONTEXT
#define NOT_CAPTURING if (capturing) return CAPTURE_UNSUPPORTED
static int capturing;

Result cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
Result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Result cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? 101 : SUCCESS; }
Result cuDeviceGetName(char *name, int room, int device) { (void)device; snprintf(name, room, "a processor"); return SUCCESS; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 97 ? 227 << 10 : -1;
    return *value < 0 ? INVALID_VALUE : SUCCESS;
}
Result cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = &current_contexts; current_contexts++; return SUCCESS; }
Result cuDevicePrimaryCtxRelease_v2(int device) { (void)device; current_contexts--; return SUCCESS; }
Result cuCtxSetCurrent(void *context) { current = context == &current_contexts; return current ? SUCCESS : INVALID_CONTEXT; }
Result cuGetErrorName(Result error, const char **name) { *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR"; return SUCCESS; }
Result cuGetErrorString(Result error, const char **text) { *text = error == OUT_OF_MEMORY ? "out of memory" : "an error"; return SUCCESS; }

Result cuMemGetInfo_v2(size_t *free, size_t *total) { IN_CONTEXT; *free = TOTAL - taken; *total = TOTAL; return SUCCESS; }

Result cuMemAlloc_v2(Address *address, size_t bytes) {
    IN_CONTEXT; NOT_CAPTURING;
    if (bytes == 0) return INVALID_VALUE;
    if (taken + bytes > TOTAL || allocations == 65536) return OUT_OF_MEMORY;
    // As the real one: aligned to 256, and full of what was there.
    void *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!memory) return OUT_OF_MEMORY;
    if (bytes < 1 << 20) memset(memory, 0xff, bytes);
    allocated[allocations].start = *address = (Address)(uintptr_t)memory;
    allocated[allocations++].bytes = bytes;
    taken += bytes;
    live++;
    return SUCCESS;
}

Result cuMemFree_v2(Address address) {
    IN_CONTEXT;
    for (int at = 0; at < allocations; at++)
        if (allocated[at].start == address) {
            taken -= allocated[at].bytes;
            allocated[at] = allocated[--allocations];
            free((void *)(uintptr_t)address);
            live--;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

Result cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) { IN_CONTEXT; (void)flags; *memory = malloc(bytes); live++; return SUCCESS; }
Result cuMemFreeHost(void *memory) { IN_CONTEXT; free(memory); live--; return SUCCESS; }

Result cuStreamCreate(Stream **stream, unsigned flags) { IN_CONTEXT; (void)flags; *stream = calloc(1, sizeof(Stream)); live++; return SUCCESS; }
Result cuStreamSynchronize(Stream *stream) { IN_CONTEXT; NOT_CAPTURING; return run_until(stream, stream->queue.count); }
Result cuStreamDestroy_v2(Stream *stream) { IN_CONTEXT; free(stream->queue.all); free(stream->captured.all); free(stream); live--; return SUCCESS; }

static Result copy(void *to, const void *from, size_t bytes, Stream *stream) {
    IN_CONTEXT; NOT_CAPTURING;
    Operation *operation = push(&stream->queue);
    operation->kind = COPY;
    operation->to = to;
    operation->from = from;
    operation->bytes = bytes;
    return SUCCESS;
}

Result cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, Stream *stream) {
    return holds(to, bytes) ? copy((void *)(uintptr_t)to, from, bytes, stream) : INVALID_VALUE;
}

Result cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, Stream *stream) {
    return holds(from, bytes) ? copy(to, (const void *)(uintptr_t)from, bytes, stream) : INVALID_VALUE;
}

Result cuMemsetD8Async(Address to, unsigned char value, size_t bytes, Stream *stream) {
    IN_CONTEXT; NOT_CAPTURING;
    if (!holds(to, bytes)) return INVALID_VALUE;
    Operation *operation = push(&stream->queue);
    operation->kind = SET;
    operation->to = (void *)(uintptr_t)to;
    operation->value = value;
    operation->bytes = bytes;
    return SUCCESS;
}

Result cuEventCreate(Event **event, unsigned flags) { IN_CONTEXT; (void)flags; *event = calloc(1, sizeof(Event)); live++; return SUCCESS; }
Result cuEventDestroy_v2(Event *event) { IN_CONTEXT; free(event); live--; return SUCCESS; }

Result cuEventRecord(Event *event, Stream *stream) {
    IN_CONTEXT; NOT_CAPTURING;
    Operation *operation = push(&stream->queue);
    event->stream = stream;
    operation->kind = RECORD;
    operation->event = event;
    operation->number = ++event->number;
    return SUCCESS;
}

Result cuStreamWaitEvent(Stream *stream, Event *event, unsigned flags) {
    IN_CONTEXT; NOT_CAPTURING;
    Operation *operation = push(&stream->queue);
    (void)flags;
    operation->kind = AWAIT;
    operation->event = event;
    operation->number = event->number;
    return SUCCESS;
}

Result cuEventSynchronize(Event *event) {
    IN_CONTEXT;
    Operation operation = {.kind = AWAIT, .event = event, .number = event->number};
    return run_one(&operation);
}

// The image is a shared library, and as long as its table of sections says.
Result cuModuleLoadData(Module **module, const unsigned char *image) {
    IN_CONTEXT; NOT_CAPTURING;
    uint64_t sections;
    uint16_t size, count;
    memcpy(&sections, image + 40, 8);
    memcpy(&size, image + 58, 2);
    memcpy(&count, image + 60, 2);
    char path[] = "/tmp/baton-module-XXXXXX";
    int file = mkstemp(path);
    if (memcmp(image, "\177ELF", 4) || file < 0) return INVALID_VALUE;
    size_t bytes = sections + (size_t)size * count, at = 0;
    while (at < bytes) {
        ssize_t written = write(file, image + at, bytes - at);
        if (written <= 0) return INVALID_VALUE;
        at += written;
    }
    close(file);
    *module = calloc(1, sizeof(Module));
    (*module)->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    unlink(path);
    if (!(*module)->library) return INVALID_VALUE;
    *(void **)&(*module)->run = dlsym((*module)->library, "emulator_run");
    live++;
    return SUCCESS;
}

static Function *functions;

Result cuModuleGetFunction(Function **function, Module *module, const char *name) {
    IN_CONTEXT;
    const void *entry = dlsym(module->library, name);
    if (!entry) return NOT_FOUND;
    *function = calloc(1, sizeof(Function));
    (*function)->module = module;
    (*function)->entry = entry;
    (*function)->shared_bytes = 48 << 10;
    (*function)->next = functions;
    functions = *function;
    return SUCCESS;
}

Result cuModuleUnload(Module *module) {
    IN_CONTEXT;
    for (Function **at = &functions; *at;) {
        Function *own = *at;
        if (own->module == module) {
            *at = own->next;
            free(own);
        } else at = &own->next;
    }
    dlclose(module->library);
    free(module);
    live--;
    return SUCCESS;
}

Result cuFuncSetAttribute(Function *function, int attribute, int value) {
    IN_CONTEXT;
    if (attribute != 8 || value > 227 << 10) return INVALID_VALUE;
    function->shared_bytes = value;
    return SUCCESS;
}

Result cuLaunchKernel(Function *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
                      unsigned shared_bytes, Stream *stream, void **params, void **extra) {
    IN_CONTEXT;
    if (!x || !y || !z || y > 65535 || z > 65535 || threads_y != 1 || threads_z != 1 || extra || (int)shared_bytes > function->shared_bytes)
        return INVALID_VALUE;
    Operation *operation = push(stream->captures ? &stream->captured : &stream->queue);
    operation->kind = RUN;
    operation->function = function;
    operation->grid[0] = x;
    operation->grid[1] = y;
    operation->grid[2] = z;
    operation->threads = threads;
    operation->shared_bytes = shared_bytes;
    // Parameters are copied now; a structure has room for 32 words.
    memcpy(operation->args, params[0], sizeof operation->args);
    return SUCCESS;
}

Result cuStreamBeginCapture_v2(Stream *stream, int mode) {
    IN_CONTEXT;
    (void)mode;
    if (stream->captures) return CAPTURE_UNSUPPORTED;
    stream->captures = capturing = 1;
    return SUCCESS;
}

Result cuStreamEndCapture(Stream *stream, Graph **graph) {
    IN_CONTEXT;
    if (!stream->captures) return INVALID_VALUE;
    *graph = calloc(1, sizeof(Graph));
    (*graph)->calls = stream->captured;
    memset(&stream->captured, 0, sizeof stream->captured);
    stream->captures = capturing = 0;
    live++;
    return SUCCESS;
}

Result cuGraphInstantiateWithFlags(Graph **executable, const Graph *graph, Address flags) {
    IN_CONTEXT;
    if (flags) return INVALID_VALUE;
    *executable = calloc(1, sizeof(Graph));
    for (size_t at = 0; at < graph->calls.count; at++) *push(&(*executable)->calls) = graph->calls.all[at];
    live++;
    return SUCCESS;
}

Result cuGraphDestroy(Graph *graph) { IN_CONTEXT; free(graph->calls.all); free(graph); live--; return SUCCESS; }
Result cuGraphExecDestroy(Graph *graph) { return cuGraphDestroy(graph); }

Result cuGraphLaunch(const Graph *graph, Stream *stream) {
    IN_CONTEXT; NOT_CAPTURING;
    for (size_t at = 0; at < graph->calls.count; at++) *push(&stream->queue) = graph->calls.all[at];
    return SUCCESS;
}
