#include "student.h"

#include <math.h>
#include <string.h>
#ifndef STUDENT_NO_FILES
#include <stdio.h>
#include <stdlib.h>
#endif

#include "onestep.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "weights are stored with the lowest byte first; this processor has the other order"
#endif

/* ---- SHA-256 (FIPS 180-4) --------------------------------------------------------------------------------------- */

typedef struct {
  uint32_t state[8];
  uint8_t block[64];
  uint64_t bytes;
} Sha;

static uint32_t rotate(uint32_t a, int n) { return (a >> n) | (a << (32 - n)); }

static void sha_block(Sha *sha) {
  static const uint32_t k[64] = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
      0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
      0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
      0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
      0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
      0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
      0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
  uint32_t w[64], s[8];
  for (int i = 0; i < 16; i++) {
    const uint8_t *b = sha->block + 4 * i;
    w[i] = (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
  }
  for (int i = 16; i < 64; i++) {
    uint32_t a = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >> 3);
    uint32_t b = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >> 10);
    w[i] = w[i - 16] + a + w[i - 7] + b;
  }
  memcpy(s, sha->state, sizeof s);
  for (int i = 0; i < 64; i++) {
    uint32_t a = (rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6]));
    uint32_t b = (rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22)) +
                 ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
    a += s[7] + k[i] + w[i];
    memmove(s + 1, s, 7 * sizeof *s);
    s[4] += a;
    s[0] = a + b;
  }
  for (int i = 0; i < 8; i++) sha->state[i] += s[i];
}

static void sha_begin(Sha *sha) {
  static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  memcpy(sha->state, start, sizeof start);
  sha->bytes = 0;
}

static void sha_add(Sha *sha, const uint8_t *data, size_t n) {
  while (n > 0) {
    size_t at = (size_t)(sha->bytes % 64), some = 64 - at < n ? 64 - at : n;
    memcpy(sha->block + at, data, some);
    sha->bytes += some;
    data += some;
    n -= some;
    if (sha->bytes % 64 == 0) sha_block(sha);
  }
}

static void sha_end(Sha *sha, uint8_t digest[32]) {
  uint8_t end[72] = {0x80};
  uint64_t bits = sha->bytes * 8;
  size_t zeros = (size_t)((119 - sha->bytes % 64) % 64); /* so that the length ends a block */
  for (int i = 0; i < 8; i++) end[1 + zeros + (size_t)i] = (uint8_t)(bits >> (56 - 8 * i));
  sha_add(sha, end, 9 + zeros);
  for (int i = 0; i < 32; i++) digest[i] = (uint8_t)(sha->state[i / 4] >> (24 - 8 * (i % 4)));
}

/* ---- Noise: torch's generator for the processor (MT19937), and its normal numbers (Box and Muller) --------------- */

typedef struct {
  uint32_t state[624];
  int next;
} Generator;

static void generator_seed(Generator *g, uint32_t seed) {
  g->state[0] = seed;
  for (uint32_t i = 1; i < 624; i++) {
    uint32_t before = g->state[i - 1];
    g->state[i] = 1812433253u * (before ^ (before >> 30)) + i;
  }
  g->next = 624;
}

static uint32_t generator_next(Generator *g) {
  uint32_t *s = g->state;
  if (g->next == 624) {
    for (int i = 0; i < 624; i++) {
      uint32_t y = (s[i] & 0x80000000u) | (s[(i + 1) % 624] & 0x7fffffffu);
      s[i] = s[(i + 397) % 624] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0);
    }
    g->next = 0;
  }
  uint32_t y = s[g->next++];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

/* 24 random bits, in [0, 1). */
static float generator_uniform(Generator *g) { return (float)(generator_next(g) & 0xffffff) * 0x1p-24f; }

/* a * b + c, rounded once. Torch's own code is compiled to such instructions; where the processor has none, double
 * precision gives the same but for one case in some hundred million. */
static float fused(float a, float b, float c) {
#ifdef FP_FAST_FMAF
  return fmaf(a, b, c);
#else
  return (float)((double)a * b + c);
#endif
}

/* Natural logarithm, sine and cosine as in the Cephes library, which torch's vector code follows. Operation for
 * operation, so that a seed gives torch's noise bit for bit; 0 < x <= 1. */
static float cephes_log(float x) {
  static const float p[] = {7.0376836292E-2f, -1.1514610310E-1f, 1.1676998740E-1f,  -1.2420140846E-1f, 1.4249322787E-1f,
                            -1.6668057665E-1f, 2.0000714765E-1f, -2.4999993993E-1f, 3.3333331174E-1f};
  uint32_t bits;
  memcpy(&bits, &x, 4);
  float e = (float)((int)(bits >> 23) - 126);
  bits = (bits & 0x807fffff) | 0x3f000000; /* the mantissa, in [0.5, 1) */
  memcpy(&x, &bits, 4);
  int low = x < .707106781186547524f;
  float part = low ? x : 0;
  x -= 1;
  e -= low ? 1.f : 0.f;
  x += part;
  float z = x * x, y = p[0];
  for (int i = 1; i < 9; i++) y = fused(y, x, p[i]);
  y = y * x;
  y = fused(y, z, e * -2.12194440e-4f);
  y = fused(-.5f, z, y);
  return fused(e, .693359375f, x + y);
}

static void cephes_sincos(float x, float *sine, float *cosine) { /* 0 <= x < 8192 */
  int octant = ((int)(x * 1.27323954473516f) + 1) & ~1;
  float y = (float)octant;
  x = fused(y, -.78515625f, x);
  x = fused(y, -2.4187564849853515625e-4f, x);
  x = fused(y, -3.77489497744594108e-8f, x);
  float z = x * x;
  float c = fused(fused(2.443315711809948E-005f, z, -1.388731625493765E-003f), z, 4.166664568298827E-002f);
  c = fused(c * z, z, -.5f * z) + 1;
  float s = fused(fused(-1.9515295891E-4f, z, 8.3321608736E-3f), z, -1.6666654611E-1f);
  s = fused(s * z, x, x);
  int swap = octant & 2;
  *sine = (swap ? c : s) * (octant & 4 ? -1.f : 1.f);
  *cosine = (swap ? s : c) * ((octant - 2) & 4 ? 1.f : -1.f);
}

/* Sixteen uniform numbers become normal: eight radii, eight angles. */
static void normal_16(float *a) {
  for (int i = 0; i < 8; i++) {
    float radius = sqrtf(-2 * cephes_log(1 - a[i])), sine, cosine;
    cephes_sincos(6.283185307179586f * a[i + 8], &sine, &cosine);
    a[i] = radius * cosine;
    a[i + 8] = radius * sine;
  }
}

_Static_assert(IMAGE_NUMBERS >= 16, "torch draws fewer than 16 numbers in another way");

void student_noise(uint32_t seed, float *noise, int *label) {
  Generator g;
  generator_seed(&g, seed);
  for (int i = 0; i < IMAGE_NUMBERS; i++) noise[i] = generator_uniform(&g);
  for (int i = 0; i + 16 <= IMAGE_NUMBERS; i += 16) normal_16(noise + i);
  if (IMAGE_NUMBERS % 16) { /* the last sixteen are drawn anew */
    float *last = noise + IMAGE_NUMBERS - 16;
    for (int i = 0; i < 16; i++) last[i] = generator_uniform(&g);
    normal_16(last);
  }
  *label = (int)(generator_next(&g) % STUDENT_CLASSES);
}

/* ---- Weights: a header of 96 bytes, then the tensors in the order of `Net` --------------------------------------- */

/* Bytes 0-7 the magic, 8-47 ten numbers, 48-55 the bytes that follow the header, 56-63 zero, 64-95 the SHA-256 of
 * bytes 0-63 and of all that follows. */
enum { HEADER_BYTES = 96, LABEL_ROWS = STUDENT_CLASSES + (STUDENT_NULL_LABEL >= 0) };

static const uint8_t magic[8] = {'D', 'I', 'T', 'N', 'A', 'N', 'O', 0};

typedef struct {
  const uint8_t *at;
  size_t used;
} Reader;

static const void *take(Reader *reader, size_t bytes) {
  const void *found = reader->at ? reader->at + reader->used : NULL;
  reader->used += bytes;
  return found;
}

static void take_linear(Reader *reader, Linear *map, size_t rows, size_t columns) {
  static const size_t bytes_of[] = {4, 2, 1};
  map->weights = take(reader, bytes_of[STUDENT_FORMAT] * rows * columns);
  map->scales = take(reader, STUDENT_FORMAT == FORMAT_INT8 ? 4 * columns : 0);
  map->bias = take(reader, 4 * columns);
}

/* Where everything lies; returns the bytes in all. Without weights it only counts. */
static size_t find_tensors(Net *net, const uint8_t *weights) {
  Reader reader = {weights, 0};
  net->tokens = take(&reader, sizeof(table_t) * TOKENS_PAD * WIDTH_PAD);
  take_linear(&reader, &net->patch, PATCH_PAD, WIDTH_PAD);
  net->modulation = take(&reader, sizeof(table_t) * LABEL_ROWS * 2 * WIDTH_PAD);
  take_linear(&reader, &net->last, WIDTH, OUT_PAD);
  for (int l = 0; l < STUDENT_DEPTH; l++) {
    Layer *layer = net->layers + l;
    layer->modulation = take(&reader, sizeof(table_t) * LABEL_ROWS * 6 * WIDTH_PAD);
    take_linear(&reader, &layer->qkv, WIDTH, QKV_PAD);
    take_linear(&reader, &layer->proj, WIDTH, WIDTH_PAD);
    take_linear(&reader, &layer->fc1, WIDTH, HIDDEN_PAD);
    take_linear(&reader, &layer->fc2, HIDDEN, WIDTH_PAD);
  }
  return reader.used;
}

static uint32_t heads_number(void) {
  static const uint32_t size[] = STUDENT_HEAD_SIZES;
  uint32_t number = 0;
  for (int l = 0; l < STUDENT_DEPTH; l++) number = number * 31 + size[l];
  return number;
}

static uint32_t number_at(const uint8_t *at) {
  return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static StudentError check_weights(const uint8_t *weights, size_t bytes) {
  const uint32_t expected[] = {STUDENT_FORMAT, STUDENT_DEPTH,    WIDTH,      HIDDEN,        STUDENT_IMAGE_SIZE,
                               STUDENT_PATCH,  STUDENT_CHANNELS, LABEL_ROWS, heads_number()};
  uint8_t digest[32];
  Sha sha;
  if (bytes < sizeof magic || memcmp(weights, magic, sizeof magic)) return STUDENT_NO_WEIGHTS;
  if (bytes < HEADER_BYTES) return STUDENT_TRUNCATED;
  if (number_at(weights + 8) != 1) return STUDENT_OTHER_VERSION;
  for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
    if (number_at(weights + 12 + 4 * i) != expected[i]) return STUDENT_OTHER_DESIGN;
  if (bytes != student_weights_bytes() || number_at(weights + 48) != bytes - HEADER_BYTES) return STUDENT_TRUNCATED;
  sha_begin(&sha);
  sha_add(&sha, weights, 64);
  sha_add(&sha, weights + HEADER_BYTES, bytes - HEADER_BYTES);
  sha_end(&sha, digest);
  return memcmp(digest, weights + 64, 32) ? STUDENT_ALTERED : STUDENT_OK;
}

/* ---- Contexts --------------------------------------------------------------------------------------------------- */

struct Student {
  Net net;
  float *noise, *image, *unguided;
  void *scratch;
  void *allocated[2]; /* by student_load */
};

enum { CONTEXT_BYTES = ROUND_UP((int)sizeof(Student), 64), IMAGE_BYTES = ROUND_UP(4 * IMAGE_NUMBERS, 64) };

size_t student_memory(void) { return 64 + CONTEXT_BYTES + 3 * (size_t)IMAGE_BYTES + onestep_scratch(1); }

size_t student_weights_bytes(void) {
  Net net;
  return HEADER_BYTES + find_tensors(&net, NULL);
}

StudentError student_open(Student **student, const void *weights, size_t weights_bytes, void *memory,
                          size_t memory_bytes) {
  *student = NULL;
  StudentError error = check_weights(weights, weights_bytes);
  if (error) return error;
  if (!memory || memory_bytes < student_memory()) return STUDENT_NO_MEMORY;
  uint8_t *at = (uint8_t *)memory + (64 - (uintptr_t)memory % 64) % 64;
  memset(at, 0, student_memory() - 64);
  Student *s = (Student *)(void *)at;
  find_tensors(&s->net, (const uint8_t *)weights + HEADER_BYTES);
  s->noise = (float *)(void *)(at += CONTEXT_BYTES);
  s->image = (float *)(void *)(at += IMAGE_BYTES);
  s->unguided = (float *)(void *)(at += IMAGE_BYTES);
  s->scratch = at + IMAGE_BYTES;
  *student = s;
  return STUDENT_OK;
}

static StudentError check_inputs(int label, float guidance) {
  if (label < STUDENT_ANY_LABEL || label >= LABEL_ROWS) return STUDENT_BAD_LABEL;
  return !(guidance - guidance == 0) || (guidance != 1 && STUDENT_NULL_LABEL < 0) ? STUDENT_BAD_GUIDANCE : STUDENT_OK;
}

static void draw_guided(Student *student, const float *noise, int label, float guidance, float *image) {
  onestep_draw(&student->net, noise, label, image, student->scratch, 0, 1);
  if (guidance == 1) return;
  onestep_draw(&student->net, noise, STUDENT_NULL_LABEL, student->unguided, student->scratch, 0, 1);
  for (int i = 0; i < IMAGE_NUMBERS; i++)
    image[i] = student->unguided[i] + guidance * (image[i] - student->unguided[i]);
}

static void to_bytes(const float *image, uint8_t *pixels) {
  const int area = STUDENT_IMAGE_SIZE * STUDENT_IMAGE_SIZE;
  for (int c = 0; c < STUDENT_CHANNELS; c++)
    for (int i = 0; i < area; i++) {
      float grey = image[c * area + i] * 127.5f + 128;
      pixels[i * STUDENT_CHANNELS + c] = (uint8_t)(grey < 0 ? 0 : grey > 255 ? 255 : grey);
    }
}

StudentError student_draw_floats(Student *student, uint32_t seed, int label, float guidance, float *image) {
  int drawn;
  StudentError error = check_inputs(label, guidance);
  if (error) return error;
  student_noise(seed, student->noise, &drawn);
  draw_guided(student, student->noise, label == STUDENT_ANY_LABEL ? drawn : label, guidance, image);
  return STUDENT_OK;
}

StudentError student_draw(Student *student, uint32_t seed, int label, float guidance, uint8_t *pixels) {
  StudentError error = student_draw_floats(student, seed, label, guidance, student->image);
  if (!error) to_bytes(student->image, pixels);
  return error;
}

StudentError student_draw_noise(Student *student, const float *noise, int label, float guidance, uint8_t *pixels) {
  StudentError error = label == STUDENT_ANY_LABEL ? STUDENT_BAD_LABEL : check_inputs(label, guidance);
  if (error) return error;
  draw_guided(student, noise, label, guidance, student->image);
  to_bytes(student->image, pixels);
  return STUDENT_OK;
}

const char *student_message(StudentError error) {
  switch (error) {
    case STUDENT_OK: return "no error";
    case STUDENT_NOT_READABLE: return "the weights cannot be read";
    case STUDENT_NO_WEIGHTS: return "no weights of a student; expected a file of `ditnano export --format c`";
    case STUDENT_OTHER_VERSION: return "weights of another version; expected version 1";
    case STUDENT_OTHER_DESIGN: return "weights of another design or format; expected those that this was compiled for";
    case STUDENT_TRUNCATED: return "weights of another length than their header or design says; expected a whole file";
    case STUDENT_ALTERED: return "weights whose SHA-256 is not that of their header; expected an unaltered file";
    case STUDENT_NO_MEMORY: return "not enough memory; expected student_memory() bytes";
    case STUDENT_BAD_LABEL: return "no such label";
    case STUDENT_BAD_GUIDANCE: return "guidance is not finite, or needs a null label that this student lacks";
  }
  return "unknown error";
}

/* ---- Files ------------------------------------------------------------------------------------------------------ */

#ifndef STUDENT_NO_FILES
static StudentError read_file(const char *path, uint8_t *to, size_t room, size_t *bytes) {
  FILE *file = fopen(path, "rb");
  if (!file) return STUDENT_NOT_READABLE;
  *bytes = fread(to, 1, room, file);
  int failed = ferror(file);
  fclose(file);
  return failed ? STUDENT_NOT_READABLE : STUDENT_OK;
}

StudentError student_load(Student **student, const char *path) {
  size_t room = student_weights_bytes() + 1, bytes = 0; /* one more: a file that is too long is noticed */
  uint8_t *weights = malloc(room);
  void *memory = malloc(student_memory());
  *student = NULL;
  StudentError error = weights && memory ? read_file(path, weights, room, &bytes) : STUDENT_NO_MEMORY;
  if (!error) error = student_open(student, weights, bytes, memory, student_memory());
  if (error) {
    free(weights);
    free(memory);
    return error;
  }
  (*student)->allocated[0] = weights;
  (*student)->allocated[1] = memory;
  return STUDENT_OK;
}

void student_close(Student *student) {
  if (!student || !student->allocated[1]) return;
  void *weights = student->allocated[0], *memory = student->allocated[1];
  free(weights);
  free(memory);
}
#endif
