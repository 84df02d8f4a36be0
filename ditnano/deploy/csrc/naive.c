/* The same network as onestep.c in plain loops, as one writes it first: a row of weights after another, a loop for each
 * product, libm for every function. For comparison alone (`ditnano bench web`); no export contains it. */
#include "onestep.h"

#include <math.h>
#include <string.h>

#if STUDENT_FORMAT != FORMAT_FP32
#error "the plain loops read weights of fp32"
#endif

enum {
  QKV = 3 * WIDTH,
  LAYER_WEIGHTS = WIDTH * (QKV + WIDTH + 2 * HIDDEN),
  LONGER = HIDDEN > PATCH_NUMBERS ? HIDDEN : PATCH_NUMBERS
};

typedef struct {
  int unpacked;
  float patch[WIDTH * PATCH_NUMBERS], last[PATCH_NUMBERS * WIDTH], layers[STUDENT_DEPTH][LAYER_WEIGHTS];
  float x[TOKENS][WIDTH], a[TOKENS][WIDTH], h[TOKENS][LONGER], qkv[TOKENS][QKV], scores[TOKENS];
} Room;

size_t onestep_scratch(int threads) {
  (void)threads;
  return sizeof(Room);
}

/* Panels of 32 columns become rows, (columns, rows). `stored` is the number of rows in the file. */
static float *unpack(float *to, const Linear *map, int rows, int stored, int columns) {
  const float *from = map->weights;
  for (int n = 0; n < columns; n++)
    for (int k = 0; k < rows; k++) to[n * rows + k] = from[n / 32 * stored * 32 + k * 32 + n % 32];
  return to + rows * columns;
}

static void unpack_all(Room *room, const Net *net) {
  if (room->unpacked) return;
  unpack(room->patch, &net->patch, PATCH_NUMBERS, PATCH_PAD, WIDTH);
  unpack(room->last, &net->last, WIDTH, WIDTH, PATCH_NUMBERS);
  for (int l = 0; l < STUDENT_DEPTH; l++) {
    const Layer *layer = net->layers + l;
    float *at = unpack(room->layers[l], &layer->qkv, WIDTH, WIDTH, QKV);
    at = unpack(at, &layer->proj, WIDTH, WIDTH, WIDTH);
    at = unpack(at, &layer->fc1, WIDTH, WIDTH, HIDDEN);
    unpack(at, &layer->fc2, HIDDEN, HIDDEN, WIDTH);
  }
  room->unpacked = 1;
}

static void linear(float *out, const float *a, const float *weights, const float *bias, int rows, int columns) {
  for (int n = 0; n < columns; n++) {
    float sum = 0;
    for (int k = 0; k < rows; k++) sum += weights[n * rows + k] * a[k];
    out[n] = sum + bias[n];
  }
}

static void norm(float *out, const float *x, const float *shift, const float *scale) {
  float mean = 0, variance = 0;
  for (int d = 0; d < WIDTH; d++) mean += x[d];
  mean /= WIDTH;
  for (int d = 0; d < WIDTH; d++) variance += (x[d] - mean) * (x[d] - mean);
  float inverse = 1 / sqrtf(variance / WIDTH + 1e-6f);
  for (int d = 0; d < WIDTH; d++) out[d] = (x[d] - mean) * inverse * scale[d] + shift[d];
}

/* The queries are scaled already. */
static void attend(Room *room, int size) {
  float *scores = room->scores;
  for (int h = 0; h < WIDTH / size; h++)
    for (int t = 0; t < TOKENS; t++) {
      const float *query = room->qkv[t] + h * size;
      float *out = room->a[t] + h * size, most = -INFINITY, sum = 0;
      for (int j = 0; j < TOKENS; j++) {
        const float *key = room->qkv[j] + WIDTH + h * size;
        float score = 0;
        for (int c = 0; c < size; c++) score += query[c] * key[c];
        scores[j] = score;
        if (score > most) most = score;
      }
      for (int j = 0; j < TOKENS; j++) sum += scores[j] = expf(scores[j] - most);
      memset(out, 0, sizeof(float) * (size_t)size);
      for (int j = 0; j < TOKENS; j++) {
        const float *value = room->qkv[j] + 2 * WIDTH + h * size, weight = scores[j] / sum;
        for (int c = 0; c < size; c++) out[c] += weight * value[c];
      }
    }
}

static int pixel(int token, int channel, int i, int j) {
  int row = token / GRID * STUDENT_PATCH + i, column = token % GRID * STUDENT_PATCH + j;
  return (channel * STUDENT_IMAGE_SIZE + row) * STUDENT_IMAGE_SIZE + column;
}

static void feed_forward(Room *room, const Layer *layer, const float *weights, const float *m) {
  const float *fc2 = weights + WIDTH * HIDDEN;
  for (int t = 0; t < TOKENS; t++) {
    float *h = room->h[t], *a = room->a[t];
    norm(a, room->x[t], m + 3 * WIDTH_PAD, m + 4 * WIDTH_PAD);
    linear(h, a, weights, layer->fc1.bias, WIDTH, HIDDEN);
    for (int d = 0; d < HIDDEN; d++)
      h[d] = .5f * h[d] * (1 + tanhf(.7978845608f * (h[d] + .044715f * h[d] * h[d] * h[d])));
    linear(a, h, fc2, layer->fc2.bias, HIDDEN, WIDTH);
    for (int d = 0; d < WIDTH; d++) room->x[t][d] += m[5 * WIDTH_PAD + d] * a[d];
  }
}

static void block(Room *room, const Layer *layer, const float *weights, int label, int size) {
  const float *m = layer->modulation + label * 6 * WIDTH_PAD, *proj = weights + WIDTH * QKV;
  float projected[WIDTH];
  for (int t = 0; t < TOKENS; t++) {
    norm(room->a[t], room->x[t], m, m + WIDTH_PAD);
    linear(room->qkv[t], room->a[t], weights, layer->qkv.bias, WIDTH, QKV);
  }
  attend(room, size);
  for (int t = 0; t < TOKENS; t++) {
    linear(projected, room->a[t], proj, layer->proj.bias, WIDTH, WIDTH);
    for (int d = 0; d < WIDTH; d++) room->x[t][d] += m[2 * WIDTH_PAD + d] * projected[d];
  }
  feed_forward(room, layer, proj + WIDTH * WIDTH, m);
}

void onestep_draw(const Net *net, const float *noise, int label, float *image, void *scratch, int rank, int threads) {
  static const int head_size[] = STUDENT_HEAD_SIZES;
  Room *room = scratch;
  (void)rank;
  (void)threads;
  unpack_all(room, net);
  for (int t = 0; t < TOKENS; t++) {
    float *at = room->h[t];
    for (int c = 0; c < STUDENT_CHANNELS; c++)
      for (int i = 0; i < STUDENT_PATCH; i++)
        for (int j = 0; j < STUDENT_PATCH; j++) *at++ = noise[pixel(t, c, i, j)];
    linear(room->x[t], room->h[t], room->patch, net->patch.bias, PATCH_NUMBERS, WIDTH);
    for (int d = 0; d < WIDTH; d++) room->x[t][d] += net->tokens[t * WIDTH_PAD + d];
  }
  for (int l = 0; l < STUDENT_DEPTH; l++) block(room, net->layers + l, room->layers[l], label, head_size[l]);
  const float *m = net->modulation + label * 2 * WIDTH_PAD;
  for (int t = 0; t < TOKENS; t++) {
    norm(room->a[t], room->x[t], m, m + WIDTH_PAD);
    linear(room->h[t], room->a[t], room->last, net->last.bias, WIDTH, PATCH_NUMBERS);
    for (int i = 0; i < STUDENT_PATCH; i++)
      for (int j = 0; j < STUDENT_PATCH; j++)
        for (int c = 0; c < STUDENT_CHANNELS; c++)
          image[pixel(t, c, i, j)] = room->h[t][(i * STUDENT_PATCH + j) * STUDENT_CHANNELS + c];
  }
}
