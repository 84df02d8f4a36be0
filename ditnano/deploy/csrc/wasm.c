/* A student for a web page: the functions that a WebAssembly module exports. No imports, no files.
 *
 *   const at = exports.weights();                // first: it makes the memory larger
 *   const bytes = new Uint8Array(exports.memory.buffer, at, exports.weights_bytes());
 *   bytes.set(await file);                       // of student.bin
 *   if (exports.open()) ...                      // an error; text(exports.message(code)) says which
 *   exports.draw(seed, label, guidance);         // label -1 is drawn from the seed
 *   exports.walk(seed, other, t, label, guidance); // noise on the arc from one seed's (t = 0) to the other's (t = 1)
 *   exports.draw_noise(label, guidance);         // of the floats at exports.noise(), (channels, size, size)
 *   const rows = new Uint8Array(exports.memory.buffer, exports.pixels(), exports.pixels_bytes());
 *
 * A worker of its own for each thread: a module draws one image at a time.
 */
#include "student.h"

#include <math.h>

#define EXPORT(name) __attribute__((export_name(#name)))
enum { PAGE = 65536 };

static Student *student;
static uint8_t *weights_at, *memory_at;
static uint8_t pixels_at[STUDENT_PIXELS];
static float noise_at[STUDENT_PIXELS], other_noise_at[STUDENT_PIXELS];

/* New pages at the end of the module's memory; views that the page made before are then stale. */
static uint8_t *reserve(size_t bytes) {
  size_t before = __builtin_wasm_memory_grow(0, (bytes + PAGE - 1) / PAGE);
  return before == SIZE_MAX ? NULL : (uint8_t *)(before * PAGE);
}

EXPORT(weights_bytes) size_t weights_bytes(void) { return student_weights_bytes(); }

/* Where the page writes the weights. Reserves all memory, so no view becomes stale afterwards. */
EXPORT(weights) uint8_t *weights(void) {
  if (!weights_at) weights_at = reserve(student_weights_bytes());
  if (!memory_at) memory_at = reserve(student_memory());
  return weights_at;
}

EXPORT(open) StudentError open(void) {
  if (!weights() || !memory_at) return STUDENT_NO_MEMORY;
  return student_open(&student, weights_at, student_weights_bytes(), memory_at, student_memory());
}

EXPORT(draw) StudentError draw(uint32_t seed, int label, float guidance) {
  return student ? student_draw(student, seed, label, guidance, pixels_at) : STUDENT_NO_WEIGHTS;
}

/* Two independent noises on a quarter of a circle: every point between them is standard normal noise too. */
EXPORT(walk) StudentError walk(uint32_t seed, uint32_t other, float t, int label, float guidance) {
  const float angle = 1.57079633f * t, from = cosf(angle), to = sinf(angle);
  int drawn, unused;
  if (!student) return STUDENT_NO_WEIGHTS;
  student_noise(seed, noise_at, &drawn);
  if (seed != other) {
    student_noise(other, other_noise_at, &unused);
    for (int i = 0; i < STUDENT_PIXELS; i++) noise_at[i] = from * noise_at[i] + to * other_noise_at[i];
  }
  return student_draw_noise(student, noise_at, label == STUDENT_ANY_LABEL ? drawn : label, guidance, pixels_at);
}

EXPORT(noise) float *noise(void) { return noise_at; }

EXPORT(draw_noise) StudentError draw_noise(int label, float guidance) {
  return student ? student_draw_noise(student, noise_at, label, guidance, pixels_at) : STUDENT_NO_WEIGHTS;
}

EXPORT(pixels) const uint8_t *pixels(void) { return pixels_at; }
EXPORT(pixels_bytes) size_t pixels_bytes(void) { return sizeof pixels_at; }
EXPORT(message) const char *message(StudentError error) { return student_message(error); }
EXPORT(image_size) int image_size(void) { return STUDENT_IMAGE_SIZE; }
EXPORT(channels) int channels(void) { return STUDENT_CHANNELS; }
EXPORT(classes) int classes(void) { return STUDENT_CLASSES; }
EXPORT(null_label) int null_label(void) { return STUDENT_NULL_LABEL; }
EXPORT(default_guidance) float default_guidance(void) { return STUDENT_GUIDANCE; }
