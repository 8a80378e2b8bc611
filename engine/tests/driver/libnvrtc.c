// NVRTC as far as the engine calls it, on the processor: what it makes of a source is a shared library that `libcuda.c` runs. What kernels are written in as
// a device has it, `device.cu`, gives way to `emulator.c`.

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { char *source, *made, log[4096]; size_t bytes; } Program;

static int compilations;

// How many programs were compiled.
int compiled(void) { return __atomic_load_n(&compilations, __ATOMIC_RELAXED); }

int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }
const char *nvrtcGetErrorString(int code) { return code == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }

int nvrtcCreateProgram(Program **program, const char *source, const char *name, int headers, const char *const *texts, const char *const *names) {
    (void)name, (void)texts, (void)names;
    if (headers) return 4;
    *program = calloc(1, sizeof(Program));
    (*program)->source = strdup(source);
    return 0;
}

int nvrtcDestroyProgram(Program **program) {
    free((*program)->source);
    free((*program)->made);
    free(*program);
    *program = 0;
    return 0;
}

int nvrtcCompileProgram(Program *program, int count, const char *const *options) {
    char source[] = "/tmp/baton-kernel-XXXXXX.c", object[sizeof source + 3], command[1024];
    const char *device = strstr(program->source, "#line 1 \"device.cu\""), *rest = strstr(program->source, "#line 1 \"common.cu\"");
    if (!count || strcmp(options[0], "--gpu-architecture=sm_90a") || !device || !rest) return 6;
    int file = mkstemps(source, 2);
    if (file < 0) return 6;
    FILE *to = fdopen(file, "w");
    fprintf(to, "%.*s#include \"%s\"\n%s", (int)(device - program->source), program->source, EMULATOR, rest);
    fclose(to);
    snprintf(object, sizeof object, "%s.so", source);
    snprintf(command, sizeof command, "cc -std=gnu11 -O1 -ffp-contract=off -fPIC -shared -w -o %s %s -lm 2>&1", object, source);
    FILE *compiler = popen(command, "r");
    size_t read = fread(program->log, 1, sizeof program->log - 1, compiler);
    int status = pclose(compiler);
    program->log[read] = 0;
    unlink(source);
    if (status) return 6;
    FILE *from = fopen(object, "r");
    fseek(from, 0, SEEK_END);
    program->bytes = ftell(from);
    rewind(from);
    program->made = malloc(program->bytes);
    read = fread(program->made, 1, program->bytes, from);
    fclose(from);
    unlink(object);
    // Cards compile beside each other.
    __atomic_add_fetch(&compilations, 1, __ATOMIC_RELAXED);
    return read == program->bytes ? 0 : 6;
}

int nvrtcGetCUBINSize(const Program *program, size_t *bytes) { *bytes = program->bytes; return 0; }
int nvrtcGetCUBIN(const Program *program, char *to) { memcpy(to, program->made, program->bytes); return 0; }
int nvrtcGetProgramLogSize(const Program *program, size_t *bytes) { *bytes = strlen(program->log) + 1; return 0; }
int nvrtcGetProgramLog(const Program *program, char *to) { strcpy(to, program->log); return 0; }
