/* One step of a small diffusion transformer: noise and a label in, an image out.
 *
 * The design (depth, width, heads, image size, ...) is known when this is compiled: design.h holds it as macros.
 * A whole image passes through all layers before the next begins, so that what it makes stays in the cache.
 */
#ifndef ONESTEP_H
#define ONESTEP_H

#include <stddef.h>
#include <stdint.h>

#include "design.h"

/* How matrices are stored (STUDENT_FORMAT). Everything else is float, except the tables of FP16 and INT8, which are
 * half precision. BF16_PAIRS serves a computation in bfloat16: two rows of a matrix, interleaved. */
#define FORMAT_FP32 0
#define FORMAT_FP16 1
#define FORMAT_INT8 2
#define FORMAT_BF16_PAIRS 3

#define ROUND_UP(n, k) (((n) + (k)-1) / (k) * (k))

/* Sizes. Tokens are padded to 16, columns to 32: whole tiles. */
enum {
  GRID = STUDENT_IMAGE_SIZE / STUDENT_PATCH,
  TOKENS = GRID * GRID,
  WIDTH = STUDENT_WIDTH,
  HIDDEN = STUDENT_HIDDEN,
  PATCH_NUMBERS = STUDENT_CHANNELS * STUDENT_PATCH * STUDENT_PATCH,
  IMAGE_NUMBERS = STUDENT_CHANNELS * STUDENT_IMAGE_SIZE * STUDENT_IMAGE_SIZE,
  TOKENS_PAD = ROUND_UP(TOKENS, 16),
  WIDTH_PAD = ROUND_UP(WIDTH, 32),
  QKV_PAD = ROUND_UP(3 * WIDTH, 32),
  HIDDEN_PAD = ROUND_UP(HIDDEN, 32),
  PATCH_PAD = ROUND_UP(PATCH_NUMBERS, 2),
  OUT_PAD = ROUND_UP(PATCH_NUMBERS, 32)
};

#if STUDENT_FORMAT == FORMAT_FP16 || STUDENT_FORMAT == FORMAT_INT8
typedef uint16_t table_t;
#else
typedef float table_t;
#endif

/* A linear map. Weights lie in panels of 32 columns, row after row within a panel. */
typedef struct {
  const void *weights;
  const float *scales; /* of the columns, for INT8 alone */
  const float *bias;
} Linear;

/* The modulation of a layer is a table: for each label, shift, scale (its 1 included) and gate, twice. */
typedef struct {
  const table_t *modulation; /* (labels, 6, WIDTH_PAD) */
  Linear qkv, proj, fc1, fc2;
} Layer;

typedef struct {
  const table_t *tokens; /* (TOKENS_PAD, WIDTH_PAD): position code and the bias of the patches */
  Linear patch;
  const table_t *modulation; /* (labels, 2, WIDTH_PAD), of the last map */
  Linear last;
  Layer layers[STUDENT_DEPTH];
} Net;

/* Bytes of scratch memory for one image that `threads` threads make together. */
size_t onestep_scratch(int threads);

/* Make one image: noise and image are (channels, size, size). Each of `threads` threads calls this with a rank of its
 * own and the same other arguments; scratch is then aligned to 64 bytes, and all zero before its first use. When one of
 * them returns, the image is whole. */
void onestep_draw(const Net *net, const float *noise, int label, float *image, void *scratch, int rank, int threads);

#endif
