// NVIDIA's driver as far as the engine calls it, on the processor: some cards, whose machine code are shared libraries made by `libnvrtc.c`.
//
// It is stricter than the real one. What is asynchronous is put off until somebody waits for it, so memory that is used again too early
// shows; a thread without a current context, what belongs to another card than the current one, copies beyond an allocation, and what a stream
// that captures forbids are errors; and what was not given back when the context goes is counted (`leaks`).
//
// Memory of a process can be opened in another, as long as it is there. Cards of one process reach each other's memory once that was allowed.
//
// Any thread may call. Whoever waits for a stream does the stream's work, and before it what other streams owe it: up to an event, or up
// to where they meet it (`libnccl.c`). The tables are locked meanwhile, but never while a copy or a kernel runs.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long long Address;
typedef int Result;
enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, PEER_ALREADY_ENABLED = 704, INVALID_HANDLE = 400, NOT_FOUND = 500,
    LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900, NOT_READY = 600, CAPTURE_WRONG_THREAD = 908
};

// Memory from `SHARED_BYTES` on can be opened in other processes.
enum { CARDS = 3, PATIENCE_SECONDS = 20, SHARED_BYTES = 1 << 16, OPENED = 64 };
enum { COPY, SET, RUN, CALL, RECORD, AWAIT, MEET };

typedef struct { int retained; size_t taken; int broken, hung, reaches[CARDS]; } Context;
typedef struct Module {
    Context *context;
    void *library;
    int (*run)(const void *, const void *, const unsigned *, unsigned, Address, int, char *, Address);
} Module;
typedef struct Function { Module *module; const void *entry; int shared_bytes; struct Function *next; } Function;
typedef struct Event Event;

// Comes to `place`, where streams meet. Returns 0 when all have come, and with that lets all of them go on; -1 while others are to come, when it is asked
// again from time to time; or an error. One thread at a time asks.
typedef Result Meet(void *place, int rank, const void *from, void *to, size_t bytes);
// Does what a library asked of a stream.
typedef void Call(const uint64_t *args);

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
    Call *call;
    Meet *meet;
    void *place;
    // Whether it has come to where it meets others.
    int came;
} Operation;

// Those from `done` to `count` are to be done; `before` others were here.
typedef struct { Operation *all; size_t count, done, room, before; } Queue;
typedef struct Stream {
    Context *context;
    Queue queue;
    int captures;
    Queue captured;
    // Whether a thread does its first operation, and what went wrong: nothing is done after that.
    int runs;
    Result fault;
    struct Stream *next;
} Stream;
struct Event { Context *context; Stream *stream; int number, passed; };
typedef struct { Context *context; Queue calls; } Graph;

static pthread_mutex_t tables = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct { Address start; size_t bytes; Context *context; int file; } allocated[65536];
static struct { Address start; size_t bytes; Context *context; } opened[OPENED];
static int allocations, live, running, vain;
static Stream *streams;
static Context contexts[CARDS];
static const size_t TOTAL = (size_t)4 << 30;
static __thread Context *current;
// The stream for which this thread captures.
static __thread Stream *capturing;

static void unlock(int *locked) { (void)locked; pthread_mutex_unlock(&tables); }
#define LOCKED __attribute__((cleanup(unlock), unused)) int locked = pthread_mutex_lock(&tables)
#define IN_CONTEXT LOCKED; if (!current || !current->retained) return INVALID_CONTEXT
#define NOT_CAPTURING if (capturing) return CAPTURE_UNSUPPORTED
#define OWN(thing) if ((thing)->context != current) return INVALID_HANDLE

// What is alive that the context should have taken with it, and contexts.
int leaks(void) {
    LOCKED;
    int all = live;
    for (int card = 0; card < CARDS; card++) all += contexts[card].retained;
    return all;
}

// How often a stream met nobody.
int in_vain(void) { LOCKED; return vain; }

// From here on, or no longer, the second card fails when it runs a kernel.
int break_card(void) { LOCKED; contexts[1].broken = 1; return 0; }
// From here on the first card is never ready.
int hang_card(void) { LOCKED; contexts[0].hung = 1; return 0; }
int mend_card(void) { LOCKED; contexts[1].broken = 0; return 0; }

static Operation *push(Queue *queue) {
    if (queue->count == queue->room) {
        queue->room = queue->room ? 2 * queue->room : 64;
        queue->all = realloc(queue->all, queue->room * sizeof(Operation));
    }
    memset(&queue->all[queue->count], 0, sizeof(Operation));
    // Somebody may have nothing to do but this.
    pthread_cond_broadcast(&changed);
    return &queue->all[queue->count++];
}

static int holds(Address start, size_t bytes) {
    for (int at = 0; at < allocations; at++)
        if (start >= allocated[at].start && start + bytes <= allocated[at].start + allocated[at].bytes) return allocated[at].context == current;
    return 0;
}

// Returns once something has changed. Fails when nobody does anything any more.
static Result pause_for_others(void) {
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += PATIENCE_SECONDS;
    return pthread_cond_timedwait(&changed, &tables, &end) == ETIMEDOUT && !running ? LAUNCH_FAILED : SUCCESS;
}

// Work that waits for nobody; the tables are not locked.
static Result run_one(const Operation *operation) {
    char problem[512];
    switch (operation->kind) {
    case COPY: memcpy(operation->to, operation->from, operation->bytes); break;
    case SET: memset(operation->to, operation->value, operation->bytes); break;
    case CALL: operation->call(operation->args); break;
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

// Returns a stream that has to do something before it comes to `place`, if that has been asked of any.
static Stream *owes(const void *place) {
    for (Stream *stream = streams; stream; stream = stream->next)
        for (size_t at = stream->queue.done; at < stream->queue.count && !stream->fault; at++) {
            const Operation *operation = &stream->queue.all[at];
            if (operation->kind != MEET || operation->place != place) continue;
            if (!operation->came) return stream;
            break;
        }
    return 0;
}

// Takes the first operation from a stream, as done.
static void pass(Queue *queue) {
    if (++queue->done == queue->count) {
        queue->before += queue->count;
        queue->done = queue->count = 0;
    }
    pthread_cond_broadcast(&changed);
}

static int awaits(const Event *event, int number) {
    const Stream *stream = event->stream;
    return stream && event->passed < number && stream->queue.done < stream->queue.count && !stream->fault;
}

// Does the first operation of a stream that has one. Where that waits for another stream it does something there, and else waits until something has changed.
static void advance(Stream *stream) {
    if (stream->runs) {
        pause_for_others();
        return;
    }
    Queue *queue = &stream->queue;
    Operation operation = queue->all[queue->done];
    Result result = SUCCESS;
    switch (operation.kind) {
    case AWAIT:
        if (awaits(operation.event, operation.number)) {
            advance(operation.event->stream);
            return;
        }
        if (operation.event->stream) result = operation.event->stream->fault;
        break;
    case RECORD: operation.event->passed = operation.number; break;
    case MEET:
        queue->all[queue->done].came = 1;
        result = operation.meet(operation.place, operation.number, operation.from, operation.to, operation.bytes);
        if (result < 0) {
            Stream *other = owes(operation.place);
            if (other) advance(other);
            else if (pause_for_others()) {
                fprintf(stderr, "libcuda: rank %d has waited for its peers in vain\n", operation.number);
                stream->fault = LAUNCH_FAILED;
                vain++;
            }
            return;
        }
        for (Stream *other = streams; other && !result; other = other->next) {
            const Operation *first = other->queue.all + other->queue.done;
            if (other != stream && other->queue.count && first->came && first->place == operation.place) pass(&other->queue);
        }
        break;
    case RUN:
        if (stream->context->broken) {
            result = LAUNCH_FAILED;
            break;
        }
        // fall through
    default:
        stream->runs = 1;
        running++;
        pthread_mutex_unlock(&tables);
        result = run_one(&operation);
        pthread_mutex_lock(&tables);
        running--;
        stream->runs = 0;
    }
    stream->fault = result;
    pass(queue);
}

// Waits for all that was asked of a stream so far.
static Result finish(Stream *stream) {
    size_t end = stream->queue.before + stream->queue.count;
    while (stream->queue.before + stream->queue.done < end && !stream->fault) advance(stream);
    return stream->fault;
}

// ---- For `libcublasLt.c`.

// Whether the calling thread has a context.
int in_context(void) { LOCKED; return current && current->retained; }

// Asks a stream to call a function, with up to 32 words that are copied now; it uses `regions` regions of the card's memory.
Result queue_call(Stream *stream, Call *call, const uint64_t *args, size_t words, const Address *starts, const size_t *bytes, int regions) {
    IN_CONTEXT; OWN(stream);
    for (int at = 0; at < regions; at++)
        if (!holds(starts[at], bytes[at])) return INVALID_VALUE;
    Operation *operation = push(stream->captures ? &stream->captured : &stream->queue);
    operation->kind = CALL;
    operation->call = call;
    memcpy(operation->args, args, words * sizeof *args);
    return SUCCESS;
}

// ---- For `libnccl.c`.

// Asks a stream to meet others in `place`.
Result queue_meeting(Stream *stream, int device, Meet *meet, void *place, int rank, Address from, size_t bytes, Address to, size_t all_bytes) {
    IN_CONTEXT; OWN(stream);
    if (current != &contexts[device] || !holds(from, bytes) || !holds(to, all_bytes)) return INVALID_VALUE;
    Operation *operation = push(stream->captures ? &stream->captured : &stream->queue);
    operation->kind = MEET;
    operation->meet = meet;
    operation->place = place;
    operation->number = rank;
    operation->from = (const void *)(uintptr_t)from;
    operation->to = (void *)(uintptr_t)to;
    operation->bytes = bytes;
    return SUCCESS;
}

// Waits until no stream is to come to `place` any more.
void finish_meetings(const void *place) {
    LOCKED;
    for (Stream *stream = streams; stream;) {
        size_t at = stream->queue.done;
        while (at < stream->queue.count && (stream->queue.all[at].kind != MEET || stream->queue.all[at].place != place)) at++;
        if (at == stream->queue.count || stream->fault) stream = stream->next;
        else {
            advance(stream);
            // The list may have changed.
            stream = streams;
        }
    }
}

// Makes streams ask again whether they have met.
void look_again(void) { LOCKED; pthread_cond_broadcast(&changed); }

// ---- The driver.

Result cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
Result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Result cuDeviceGetCount(int *count) { *count = CARDS; return SUCCESS; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < 0 || ordinal >= CARDS ? INVALID_DEVICE : SUCCESS; }
Result cuDeviceGetName(char *name, int room, int device) { (void)device; snprintf(name, room, "a processor"); return SUCCESS; }
Result cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = TOTAL; return SUCCESS; }
Result cuDeviceGetUuid_v2(unsigned char *uuid, int device) { memset(uuid, 0xa0 + device, 16); return SUCCESS; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 97 ? 227 << 10 : -1;
    return *value < 0 ? INVALID_VALUE : SUCCESS;
}
Result cuDevicePrimaryCtxRetain(Context **context, int device) { LOCKED; *context = &contexts[device]; contexts[device].retained++; return SUCCESS; }
Result cuDevicePrimaryCtxRelease_v2(int device) { LOCKED; return contexts[device].retained-- > 0 ? SUCCESS : INVALID_CONTEXT; }
Result cuCtxSetCurrent(Context *context) { current = context; IN_CONTEXT; return SUCCESS; }
Result cuGetErrorName(Result error, const char **name) { *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR"; return SUCCESS; }
Result cuGetErrorString(Result error, const char **text) { *text = error == OUT_OF_MEMORY ? "out of memory" : "an error"; return SUCCESS; }

Result cuMemGetInfo_v2(size_t *free, size_t *total) { IN_CONTEXT; *free = TOTAL - current->taken; *total = TOTAL; return SUCCESS; }

Result cuMemAlloc_v2(Address *address, size_t bytes) {
    IN_CONTEXT; NOT_CAPTURING;
    if (bytes == 0) return INVALID_VALUE;
    if (current->taken + bytes > TOTAL || allocations == 65536) return OUT_OF_MEMORY;
    // As the real one: aligned to 256, and full of what was there.
    int file = bytes >= SHARED_BYTES ? (int)syscall(SYS_memfd_create, "card", 0) : -1;
    void *memory = file < 0 ? aligned_alloc(256, (bytes + 255) / 256 * 256)
                   : ftruncate(file, bytes) ? 0 : mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (!memory || memory == MAP_FAILED) return OUT_OF_MEMORY;
    if (bytes < 1 << 20) memset(memory, 0xff, bytes);
    allocated[allocations].file = file;
    allocated[allocations].start = *address = (Address)(uintptr_t)memory;
    allocated[allocations].context = current;
    allocated[allocations++].bytes = bytes;
    current->taken += bytes;
    live++;
    return SUCCESS;
}

Result cuMemFree_v2(Address address) {
    IN_CONTEXT;
    for (int at = 0; at < allocations; at++)
        if (allocated[at].start == address && allocated[at].context == current) {
            current->taken -= allocated[at].bytes;
            if (allocated[at].file < 0) free((void *)(uintptr_t)address);
            else {
                munmap((void *)(uintptr_t)address, allocated[at].bytes);
                close(allocated[at].file);
            }
            allocated[at] = allocated[--allocations];
            live--;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

// A handle says which file of which process, and how long it is.
typedef struct { char reserved[64]; } IpcHandle;

Result cuIpcGetMemHandle(IpcHandle *handle, Address address) {
    IN_CONTEXT;
    for (int at = 0; at < allocations; at++)
        if (allocated[at].start == address && allocated[at].context == current && allocated[at].file >= 0) {
            memset(handle, 0, sizeof *handle);
            snprintf(handle->reserved, sizeof handle->reserved, "/proc/%d/fd/%d %zu", (int)getpid(), allocated[at].file, allocated[at].bytes);
            return SUCCESS;
        }
    return INVALID_VALUE;
}

Result cuIpcOpenMemHandle_v2(Address *address, IpcHandle handle, unsigned flags) {
    IN_CONTEXT;
    char path[64], own[32];
    size_t bytes;
    handle.reserved[63] = 0;
    snprintf(own, sizeof own, "/proc/%d/", (int)getpid());
    // Not in the process whose memory it is.
    if (flags != 1 || sscanf(handle.reserved, "%63s %zu", path, &bytes) != 2 || !strncmp(path, own, strlen(own))) return INVALID_CONTEXT;
    int file = open(path, O_RDWR), at = 0;
    if (file < 0) return INVALID_HANDLE;
    void *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    while (at < OPENED && opened[at].start) at++;
    if (memory == MAP_FAILED || at == OPENED) return OUT_OF_MEMORY;
    opened[at].start = *address = (Address)(uintptr_t)memory;
    opened[at].bytes = bytes;
    opened[at].context = current;
    live++;
    return SUCCESS;
}

Result cuIpcCloseMemHandle(Address address) {
    IN_CONTEXT;
    for (int at = 0; at < OPENED; at++)
        if (opened[at].start == address && address && opened[at].context == current) {
            munmap((void *)(uintptr_t)address, opened[at].bytes);
            opened[at].start = 0;
            live--;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

// The first and the last card do not reach each other.
Result cuDeviceCanAccessPeer(int *can, int device, int peer) { *can = device - peer == 1 || peer - device == 1; return SUCCESS; }

Result cuCtxEnablePeerAccess(Context *peer, unsigned flags) {
    IN_CONTEXT;
    int card = (int)(peer - contexts), can;
    cuDeviceCanAccessPeer(&can, (int)(current - contexts), card);
    if (flags || !peer->retained || !can) return INVALID_CONTEXT;
    if (current->reaches[card]) return PEER_ALREADY_ENABLED;
    current->reaches[card] = 1;
    return SUCCESS;
}

Result cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) { IN_CONTEXT; (void)flags; *memory = malloc(bytes); live++; return SUCCESS; }
Result cuMemFreeHost(void *memory) { IN_CONTEXT; free(memory); live--; return SUCCESS; }

Result cuStreamCreate(Stream **stream, unsigned flags) {
    IN_CONTEXT;
    (void)flags;
    *stream = calloc(1, sizeof(Stream));
    (*stream)->context = current;
    (*stream)->next = streams;
    streams = *stream;
    live++;
    return SUCCESS;
}

// Who asks waits: what is not done is done now.
Result cuStreamQuery(Stream *stream) { IN_CONTEXT; NOT_CAPTURING; OWN(stream); return current->hung ? NOT_READY : finish(stream); }

Result cuStreamDestroy_v2(Stream *stream) {
    IN_CONTEXT; OWN(stream);
    Stream **at = &streams;
    while (*at != stream) at = &(*at)->next;
    *at = stream->next;
    if (capturing == stream) capturing = 0;
    free(stream->queue.all);
    free(stream->captured.all);
    free(stream);
    live--;
    return SUCCESS;
}

static Result copy(void *to, const void *from, Address here, size_t bytes, Stream *stream) {
    IN_CONTEXT; NOT_CAPTURING; OWN(stream);
    if (!holds(here, bytes)) return INVALID_VALUE;
    Operation *operation = push(&stream->queue);
    operation->kind = COPY;
    operation->to = to;
    operation->from = from;
    operation->bytes = bytes;
    return SUCCESS;
}

Result cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, Stream *stream) { return copy((void *)(uintptr_t)to, from, to, bytes, stream); }
Result cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, Stream *stream) { return copy(to, (const void *)(uintptr_t)from, from, bytes, stream); }

Result cuMemsetD8Async(Address to, unsigned char value, size_t bytes, Stream *stream) {
    IN_CONTEXT; NOT_CAPTURING; OWN(stream);
    if (!holds(to, bytes)) return INVALID_VALUE;
    Operation *operation = push(&stream->queue);
    operation->kind = SET;
    operation->to = (void *)(uintptr_t)to;
    operation->value = value;
    operation->bytes = bytes;
    return SUCCESS;
}

Result cuEventCreate(Event **event, unsigned flags) {
    IN_CONTEXT;
    (void)flags;
    *event = calloc(1, sizeof(Event));
    (*event)->context = current;
    live++;
    return SUCCESS;
}

Result cuEventDestroy_v2(Event *event) { IN_CONTEXT; OWN(event); free(event); live--; return SUCCESS; }

Result cuEventRecord(Event *event, Stream *stream) {
    IN_CONTEXT; NOT_CAPTURING; OWN(event); OWN(stream);
    Operation *operation = push(&stream->queue);
    event->stream = stream;
    operation->kind = RECORD;
    operation->event = event;
    operation->number = ++event->number;
    return SUCCESS;
}

Result cuStreamWaitEvent(Stream *stream, Event *event, unsigned flags) {
    IN_CONTEXT; NOT_CAPTURING; OWN(stream);
    Operation *operation = push(&stream->queue);
    (void)flags;
    operation->kind = AWAIT;
    operation->event = event;
    operation->number = event->number;
    return SUCCESS;
}

Result cuEventQuery(Event *event) {
    IN_CONTEXT; OWN(event);
    if (current->hung) return NOT_READY;
    int number = event->number;
    while (awaits(event, number)) advance(event->stream);
    return event->stream ? event->stream->fault : SUCCESS;
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
    (*module)->context = current;
    (*module)->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    unlink(path);
    if (!(*module)->library) return INVALID_VALUE;
    *(void **)&(*module)->run = dlsym((*module)->library, "emulator_run");
    live++;
    return SUCCESS;
}

static Function *functions;

Result cuModuleGetFunction(Function **function, Module *module, const char *name) {
    IN_CONTEXT; OWN(module);
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
    IN_CONTEXT; OWN(module);
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
    IN_CONTEXT; OWN(function->module);
    if (attribute != 8 || value > 227 << 10) return INVALID_VALUE;
    function->shared_bytes = value;
    return SUCCESS;
}

Result cuLaunchKernel(Function *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
                      unsigned shared_bytes, Stream *stream, void **params, void **extra) {
    IN_CONTEXT; OWN(stream); OWN(function->module);
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
    IN_CONTEXT; NOT_CAPTURING; OWN(stream);
    // Of the modes, the one that leaves other threads alone.
    if (mode != 1) return INVALID_VALUE;
    if (stream->captures) return CAPTURE_UNSUPPORTED;
    stream->captures = 1;
    capturing = stream;
    return SUCCESS;
}

Result cuStreamEndCapture(Stream *stream, Graph **graph) {
    IN_CONTEXT; OWN(stream);
    if (!stream->captures) return INVALID_VALUE;
    if (capturing != stream) return CAPTURE_WRONG_THREAD;
    *graph = calloc(1, sizeof(Graph));
    (*graph)->context = current;
    (*graph)->calls = stream->captured;
    memset(&stream->captured, 0, sizeof stream->captured);
    stream->captures = 0;
    capturing = 0;
    live++;
    return SUCCESS;
}

Result cuGraphInstantiateWithFlags(Graph **executable, const Graph *graph, Address flags) {
    IN_CONTEXT; OWN(graph);
    if (flags) return INVALID_VALUE;
    *executable = calloc(1, sizeof(Graph));
    (*executable)->context = current;
    for (size_t at = 0; at < graph->calls.count; at++) *push(&(*executable)->calls) = graph->calls.all[at];
    live++;
    return SUCCESS;
}

Result cuGraphDestroy(Graph *graph) { IN_CONTEXT; OWN(graph); free(graph->calls.all); free(graph); live--; return SUCCESS; }
Result cuGraphExecDestroy(Graph *graph) { return cuGraphDestroy(graph); }

Result cuGraphLaunch(const Graph *graph, Stream *stream) {
    IN_CONTEXT; NOT_CAPTURING; OWN(graph); OWN(stream);
    for (size_t at = 0; at < graph->calls.count; at++) *push(&stream->queue) = graph->calls.all[at];
    return SUCCESS;
}
