/* A student as C: images from seeds, labels and guidance. For one design, which design.h holds as macros.
 *
 *   static unsigned char memory[...];                  // student_memory() bytes
 *   Student *student;
 *   uint8_t pixels[STUDENT_PIXELS];
 *   if (student_open(&student, weights, weights_bytes, memory, sizeof memory) == STUDENT_OK)
 *     student_draw(student, 7, 3, 1.5f, pixels);        // seed 7, label 3, guidance 1.5
 *
 * Nothing is allocated after opening and nothing is global: a context serves one thread at a time, several contexts
 * may share the weights. With files and malloc, student_load and student_close do the same.
 */
#ifndef STUDENT_H
#define STUDENT_H

#include <stddef.h>
#include <stdint.h>

#include "design.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  STUDENT_PIXELS = STUDENT_IMAGE_SIZE * STUDENT_IMAGE_SIZE * STUDENT_CHANNELS, /* bytes of an image */
  STUDENT_ANY_LABEL = -1                                                       /* drawn from the seed */
};

typedef enum {
  STUDENT_OK,
  STUDENT_NOT_READABLE,
  STUDENT_NO_WEIGHTS,
  STUDENT_OTHER_VERSION,
  STUDENT_OTHER_DESIGN,
  STUDENT_TRUNCATED,
  STUDENT_ALTERED,
  STUDENT_NO_MEMORY,
  STUDENT_BAD_LABEL,
  STUDENT_BAD_GUIDANCE
} StudentError;

typedef struct Student Student;

/* Bytes that a context needs, and bytes of its weights (those of the file). */
size_t student_memory(void);
size_t student_weights_bytes(void);

/* A context inside `memory`, with weights that stay where they are (flash, an array, a mapped file; aligned to 4
 * bytes). Both must live as long as the context. The weights' version, design, length and SHA-256 are checked. */
StudentError student_open(Student **student, const void *weights, size_t weights_bytes, void *memory,
                          size_t memory_bytes);

/* The same from a file, with malloc; and the end of it. */
StudentError student_load(Student **student, const char *path);
void student_close(Student *student);

/* Draw one image: rows of pixels, channels interleaved. Labels are 0 to STUDENT_CLASSES - 1, STUDENT_NULL_LABEL where
 * the student has one, or STUDENT_ANY_LABEL. Guidance 1 is off; any other value draws twice and needs a null label. */
StudentError student_draw(Student *student, uint32_t seed, int label, float guidance, uint8_t *pixels);

/* The same before it becomes bytes: (channels, size, size), nominally in [-1, 1]. */
StudentError student_draw_floats(Student *student, uint32_t seed, int label, float guidance, float *image);

/* An image of given noise (channels, size, size), standard normal; the label is not STUDENT_ANY_LABEL. */
StudentError student_draw_noise(Student *student, const float *noise, int label, float guidance, uint8_t *pixels);

/* The noise (channels, size, size) and the label of a seed, as torch draws them. */
void student_noise(uint32_t seed, float *noise, int *label);

/* One line that says what is wrong. */
const char *student_message(StudentError error);

#ifdef __cplusplus
}
#endif
#endif
